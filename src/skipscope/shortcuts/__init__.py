"""The dataflow of one forward pass: find, name, edit and add shortcuts, and tap activations.

Words (definitions.md): where activations join is a *merge*; the *branch* is its side with weights, the
*shortcut* the side that skips it, and they part at the *fork*.
"""

from skipscope._lazy_names import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
