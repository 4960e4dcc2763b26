"""The loss on planes of weight space, for one network or for twins side by side.

A plane is w + a d1 + b d2. A Gaussian direction is normalised filter by filter to |w|, and is zero for biases
and norms (Li, Xu, Taylor, Studer, Goldstein: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018,
arXiv 1712.09913).
"""

from skipscope._lazy_names import lazy_names

__getattr__, __all__ = lazy_names(__name__, __file__)
