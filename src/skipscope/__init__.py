"""See what the shortcut connections in a network do: find them, cut them, add them, measure with and without.

Example:
    >>> import skipscope as ss
    >>> from skipscope import reference
    >>> model, batch = reference.resnet20(), reference.digits(32)
    >>> found = ss.find_shortcuts(model, batch[0])
    >>> len(found)
    9
"""

import lazy_loader as _lazy

from skipscope import _result
from skipscope._version import __version__ as __version__

# Every public name is listed once, in __init__.pyi, and imported when first used: `import skipscope` is immediate.
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

# The one way upward: results draw themselves by this room's hand, and are read back from the rooms' own stores.
_result.register_drawer("skipscope.report")
_result.register_reader("skipscope.surfaces:read_store")
_result.register_reader("skipscope.monitor:read_history")
