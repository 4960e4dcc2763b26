"""See what the shortcut connections in a network do: find them, cut them, add them, measure with and without.

Example:
    >>> import skipscope as ss
    >>> from skipscope import reference
    >>> model, batch = reference.resnet20(), reference.digits(32)
    >>> found = ss.find_shortcuts(model, batch[0])
    >>> len(found)
    9
"""

from skipscope import _result
from skipscope._lazy_names import lazy_names as _lazy_names
from skipscope._version import __version__ as __version__

# Every public name is listed once, in __init__.pyi: `import skipscope` is immediate.
__getattr__, __all__ = _lazy_names(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


# `report` draws results, and stores are read by the packages that wrote them. These are the only two places
# where a lower package uses a higher package.
_result.register_drawer("skipscope.report")
_result.register_reader("skipscope.surfaces:read_store")
_result.register_reader("skipscope.monitor:read_history")
