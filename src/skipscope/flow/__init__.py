"""Analysis of the backward pass: gradient flow, verdict, split, paths, importance and remedies."""

from skipscope._lazy_names import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
