"""The dataflow of one forward pass: find, name, edit and add shortcuts, and tap activations.

Terms (definitions.md): a *merge* is a call where activations join. The *branch* is its side with weights, the
*shortcut* the side that skips the branch, and the *fork* the activation at which the two sides part.
"""

from skipscope._lazy_names import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
