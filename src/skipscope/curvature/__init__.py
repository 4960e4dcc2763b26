"""Curvature: products with the Hessian, both ends of its spectrum with bounds, its density and trace."""

from skipscope._lazy_names import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
