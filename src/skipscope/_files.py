"""Files that are written whole or not at all, and read only where reading ends."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from skipscope._errors import SkipscopeError


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, operation: str = "save") -> Path:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Raises:
        SkipscopeError: the folder does not exist, cannot be written, or the disk is full; the old file stays.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private; a saved result is an ordinary file
        os.replace(temporary, path)
    except OSError as error:
        raise SkipscopeError(
            operation,
            f"cannot write {path}: {error.strerror or error}",
            cure="choose a folder that exists, can be written and has room",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return path


def refuse_devices(path: Path, *, operation: str, expected: str) -> None:
    """Refuse what is there and is neither a folder nor a file that holds something: reading it may never end.

    The files of ``/proc`` have no size; some wait for what comes.

    Raises:
        SkipscopeError: it is a pipe, a socket, a device, or empty.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise SkipscopeError(operation, f"{path} is a pipe, a socket or a device", expected=expected)
    if path.is_file() and not path.stat().st_size:
        raise SkipscopeError(
            operation, f"{path} is empty, or a file of the system without a size", expected=expected
        )
