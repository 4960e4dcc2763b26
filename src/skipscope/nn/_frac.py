"""Frac-connections: hyper-connections between parts of one stream. Zhu et al. 2025, arXiv 2503.14125.

    H' = A H + diag(b) F(Y H)

The m rows of H are m equal parts of x. The m x m matrices Y and A and the vector b have a static term and a
small term from the data: part i gives column i of Y and A and element i of b, as tanh(norm(H_i) W) s. At the
start Y = A = I, b = 1, W = 0 and s = 0.01: a residual network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection
from skipscope.nn._dynamic_hyper import mix_streams


class FracConnection(Connection):
    """``A H + diag(b) F(Y H)`` on the m parts of ``x``.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        parts: m; halved until it divides the width.
        dim: the dimension that holds the features.

    Example:
        >>> FracConnection(nn.Linear(4, 4), 4, parts=2)(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    kind = "gated"

    def __init__(self, branch: nn.Module, width: int, *, parts: int = 4, dim: int = -1):
        super().__init__(branch)
        while width % parts:
            parts //= 2
        self.parts, self.dim = parts, dim
        self.norm = nn.LayerNorm(width // parts)
        self.matrices = nn.Parameter(torch.eye(parts).repeat(2, 1, 1))
        self.vector = nn.Parameter(torch.ones(parts))
        self.to_matrices = nn.Parameter(torch.zeros(2 * parts, width // parts))
        self.to_vector = nn.Parameter(torch.zeros(width // parts))
        self.scale, self.scale_vector = (nn.Parameter(torch.tensor(0.01)) for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        """Split ``x`` into its parts ``[m, ..., width / m]``."""
        return x.movedim(self.dim, -1).unflatten(-1, (self.parts, -1)).movedim(-2, 0)

    def merge(self, parts: Tensor) -> Tensor:
        """Join the parts ``[m, ..., width / m]`` again; the inverse of ``split``."""
        return parts.movedim(0, -2).flatten(-2).movedim(-1, self.dim)

    def weights(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Y and A ``[..., m, m]``, and b ``[m, ...]``."""
        rows = self.norm(parts)
        moved = self.scale * torch.tanh(rows @ self.to_matrices.T).movedim(0, -1)
        read, keep = (self.matrices + moved.unflatten(-2, (2, self.parts))).unbind(-3)
        vector = self.vector.reshape(-1, *[1] * (rows.ndim - 2))
        return read, keep, vector + self.scale_vector * torch.tanh(rows @ self.to_vector)

    def read(self, x: Tensor) -> Tensor:
        """``Y H``."""
        parts = self.split(x)
        return self.merge(mix_streams(parts, self.weights(parts)[0]))

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``A H + diag(b) f``."""
        parts = self.split(x)
        _, keep, vector = self.weights(parts)
        return self.merge(mix_streams(parts, keep) + vector.unsqueeze(-1) * self.split(f))
