"""Lazy import of a package's public names at first use, to keep ``import`` fast."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """Make the ``__getattr__`` and ``__all__`` of a package from its stub ``__init__.pyi``.

    Type checkers read the same stub, so that each name is listed once.

    Args:
        package: ``__name__`` of the package.
        file: ``__file__`` of the package.

    Returns:
        ``__getattr__`` and ``__all__``; no name is imported to make them.
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
