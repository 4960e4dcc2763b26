"""First-layer values in every later layer: Zhou et al. 2024 (ResFormer, arXiv 2410.17897), section 3.

x_n = x_{n-1} + softmax(Q_n K_n^T / sqrt(d)) (a V_n + b V_1) W_n,   Q_n, K_n, V_n from N(x_{n-1})

a and b are learned per layer, 1/2 each at the start; the first layer uses V_1 alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def value_residual(values: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """``a values + b first`` with ``weights`` a and b; both ``[n, heads, tokens, width / heads]``.

    Example:
        >>> value_residual(torch.ones(2), torch.zeros(2), torch.tensor([0.5, 0.5]))
        tensor([0.5000, 0.5000])
    """
    return weights[0] * values + weights[1] * first


class ValueResidualAttention(nn.Module):
    """Self-attention ``[n, tokens, width]`` whose values can be mixed with those of the first layer.

    Args:
        width: width of a token.
        heads: number of attention heads.
        causal: whether a token attends only to itself and earlier tokens.
        mixes: whether it has weights to mix its values with the first layer's; False for the first layer.

    Example:
        >>> added, values = ValueResidualAttention(8, heads=2)(torch.randn(3, 5, 8))
        >>> added.shape, values.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 2, 5, 4]))
    """

    def __init__(self, width: int, heads: int = 1, *, causal: bool = False, mixes: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.weights = nn.Parameter(torch.full((2,), 0.5)) if mixes else None

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The layer's output, to be added to its input, and its own values before mixing with ``first``."""
        parts = self.project(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, values = (part.transpose(-2, -3) for part in parts)
        used = values
        if first is not None and self.weights is not None:
            used = value_residual(values, first, self.weights)
        y = F.scaled_dot_product_attention(query, key, used, is_causal=self.causal)
        return self.out(y.transpose(-2, -3).flatten(-2)), values


class ValueResidual(nn.Module):
    """A stack of pre-norm attention layers that all use the first layer's values.

    Args:
        width: width of a token.
        layers: number of layers.
        heads: number of attention heads of each layer.
        causal: whether a token attends only to itself and earlier tokens.

    Example:
        >>> import skipscope as ss
        >>> found = ss.find_shortcuts(ValueResidual(8, 3), torch.randn(2, 5, 8))
        >>> [s.kind for s in found]
        ['identity', 'scaled', 'identity', 'scaled', 'identity']
    """

    kind = "scaled"
    identity_at_start = False

    def __init__(self, width: int, layers: int = 2, heads: int = 1, *, causal: bool = False):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attentions = nn.ModuleList(
            ValueResidualAttention(width, heads, causal=causal, mixes=layer > 0) for layer in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` -> ``[n, tokens, width]``."""
        first = None
        for norm, attention in zip(self.norms, self.attentions):
            y, values = attention(norm(x), first)
            first = values if first is None else first
            x = x + y
        return x
