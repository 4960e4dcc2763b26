"""The public names of a package, each imported when it is first used: nobody waits for what is not called."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """The ``__getattr__`` and ``__all__`` of a package whose names stand in the stub beside its ``__init__``.

    Type checkers read the same stub, so that each name is listed once.

    Args:
        package: the package's ``__name__``.
        file: its ``__file__``.

    Returns:
        ``__getattr__`` and ``__all__``; both are made before any of the names is imported.
    """
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    modules = {
        name: module for module, name in re.findall(r"^from (\S+) import (\w+) as", stub, re.MULTILINE)
    }

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = modules[name]
        if module == ".":
            value = importlib.import_module(f".{name}", package)
        else:
            value = getattr(importlib.import_module(module, package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, sorted(modules)
