"""Atomic writes, and refusal of files whose reading may never end."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from skipscope._errors import SkipscopeError


def write_whole(path: str | os.PathLike[str], content: str | bytes, *, operation: str = "save") -> Path:
    """Write ``content`` to ``path`` atomically: a reader sees the old file or the new file, never a part.

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
        # mkstemp makes the file private, but a saved result should have ordinary permissions.
        os.chmod(temporary, 0o666 & ~umask)
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
    """Refuse an existing path that is neither a folder nor a non-empty file: reading it may never end.

    Files of ``/proc`` have size zero, and reading some of them blocks.

    Raises:
        SkipscopeError: the path is a pipe, a socket, a device, or an empty file.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise SkipscopeError(operation, f"{path} is a pipe, a socket or a device", expected=expected)
    if path.is_file() and not path.stat().st_size:
        raise SkipscopeError(
            operation, f"{path} is empty, or a file of the system without a size", expected=expected
        )
