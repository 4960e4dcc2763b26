"""See what the shortcut connections in a network do: find them, cut them, add them, measure with and without.

Example:
    >>> import skipscope as ss
    >>> from skipscope import reference
    >>> model, batch = reference.resnet20(), reference.digits(32)
    >>> found = ss.find_shortcuts(model, batch[0])
    >>> len(found)
    9
"""

import importlib as _importlib
import re as _re
from pathlib import Path as _Path
from typing import Any as _Any

from skipscope import _result
from skipscope._version import __version__ as __version__

# Every public name is listed once, in __init__.pyi, and imported when first used: `import skipscope` is
# immediate.
_STUB = _Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_MODULES = {
    name: module for module, name in _re.findall(r"^from (\S+) import (\w+) as", _STUB, _re.MULTILINE)
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> _Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    if module == ".":
        value = _importlib.import_module(f".{name}", __name__)
    else:
        value = getattr(_importlib.import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


# `report` draws results, and stores are read by the packages that wrote them: no other lower package knows a
# higher one.
_result.register_drawer("skipscope.report")
_result.register_reader("skipscope.surfaces:read_store")
_result.register_reader("skipscope.monitor:read_history")
