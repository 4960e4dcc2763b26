"""Hyper-connections whose weights depend on the data.

dynamic   X' = H_res(X) X + h_post(X) F(h_pre(X) . X)      Zhu et al. 2024, arXiv 2409.19606, section 2.3
          each weight is static + s tanh(norm(X) W): W = 0 at the start, s = 0.01
mHC       the same equation, with H_res doubly stochastic  Xie et al. 2025, arXiv 2512.24880, section 4
          from x = RMSNorm of all streams side by side:
          h_pre = sigmoid(a x W + b), h_post = 2 sigmoid(a x W + b), H_res = Sinkhorn(exp(a x W + b)), a = 0.01

Both start as static hyper-connections do: as a residual network, so long as the streams are copies of one another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, normed


def mix_streams(x: Tensor, residual: Tensor) -> Tensor:
    """Streams ``x [n, ..., width]`` mixed by ``residual [..., n, n]``, one matrix a token: row i makes stream i."""
    return (residual.movedim(-1, 0).unsqueeze(-1) * x.unsqueeze(-2)).sum(0).movedim(-2, 0)


def weigh_streams(x: Tensor, pre: Tensor) -> Tensor:
    """The branch's input: ``x [n, ..., width]`` summed with weights ``pre [..., n]``."""
    return (pre.movedim(-1, 0).unsqueeze(-1) * x).sum(0)


def spread_branch(f: Tensor, post: Tensor) -> Tensor:
    """The branch's output ``f [..., width]``, for each of n streams times ``post [..., n]``."""
    return post.movedim(-1, 0).unsqueeze(-1) * f


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """``exp(logits [..., n, n])`` made doubly stochastic: columns and rows divided by their sums in turn.

    Example:
        >>> matrix = sinkhorn(torch.randn(3, 3))
        >>> torch.allclose(matrix.sum(-1), torch.ones(3)), torch.allclose(matrix.sum(-2), torch.ones(3), atol=1e-3)
        (True, True)
    """
    matrix = logits.softmax(-2)  # the exponential and the first division, without overflow
    matrix = matrix / matrix.sum(-1, keepdim=True)
    for _ in range(iterations - 1):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


class _Dynamic(Connection):
    """Streams in ``[n, ...]`` with the features in dimension ``dim`` of each; subclasses give the weights."""

    kind = "gated"

    def __init__(self, branch: nn.Module, streams: int, dim: int):
        super().__init__(branch)
        self.streams, self.dim = streams, dim

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For streams ``[n, ..., width]``: pre ``[..., n]``, post ``[..., n]``, residual ``[..., n, n]``."""
        raise NotImplementedError

    def features_last(self, x: Tensor) -> Tensor:
        """Streams with the features in their last dimension."""
        return x if self.dim < 0 else x.movedim(self.dim + 1, -1)

    def read(self, x: Tensor) -> Tensor:
        """``h_pre(X) . X``."""
        rows = self.features_last(x)
        return weigh_streams(rows, self.weights(rows)[0]).movedim(-1, self.dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``H_res(X) X + h_post(X) f``."""
        rows = self.features_last(x)
        _, post, residual = self.weights(rows)
        new = mix_streams(rows, residual) + spread_branch(f.movedim(self.dim, -1), post)
        return new if self.dim < 0 else new.movedim(-1, self.dim + 1)


class DynamicHyperConnection(_Dynamic):
    """``X' = H_res(X) X + h_post(X) F(h_pre(X) . X)``, the weights a static part and a small one from the data.

    Args:
        branch: F, on one stream.
        streams: n.
        width: size of dimension ``dim``.
        layer: this layer's place in the network; says which stream is read first.
        dim: the dimension of one stream that holds the features.
    """

    def __init__(self, branch: nn.Module, streams: int = 4, *, width: int, layer: int = 0, dim: int = -1):
        super().__init__(branch, streams, dim)
        self.norm = nn.LayerNorm(width)
        self.pre = nn.Parameter(torch.eye(streams)[layer % streams])
        self.post = nn.Parameter(torch.ones(streams))
        self.residual = nn.Parameter(torch.eye(streams))
        self.to_pre = nn.Parameter(torch.zeros(width))
        self.to_post = nn.Parameter(torch.zeros(width))
        self.to_residual = nn.Parameter(torch.zeros(streams, width))
        self.scale, self.scale_post = (nn.Parameter(torch.tensor(0.01)) for _ in range(2))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each stream says how much of it is read, written to, and passed on to every other."""
        rows = self.norm(x)
        pre = self.pre + self.scale * torch.tanh(rows @ self.to_pre).movedim(0, -1)
        post = self.post + self.scale_post * torch.tanh(rows @ self.to_post).movedim(0, -1)
        residual = self.residual + self.scale * torch.tanh(rows @ self.to_residual.T).movedim(0, -1)
        return pre, post, residual


class ManifoldHyperConnection(_Dynamic):
    """mHC: ``X' = H_res(X) X + h_post(X) F(h_pre(X) . X)`` with ``H_res`` doubly stochastic, all weights positive.

    The paper gives a; b and W are ours: W = 0 and b such that every stream is read by 1/n, gets the branch once, and
    hardly mixes.

    Args:
        branch: F, on one stream.
        streams: n.
        width: size of dimension ``dim``.
        layer: not used; for the same call as the other connections.
        dim: the dimension of one stream that holds the features.
        iterations: of Sinkhorn and Knopp's algorithm.
    """

    def __init__(
        self,
        branch: nn.Module,
        streams: int = 4,
        *,
        width: int,
        layer: int = 0,
        dim: int = -1,
        iterations: int = 20,
    ):
        super().__init__(branch, streams, dim)
        n, self.iterations = streams, iterations
        self.to_weights = nn.Linear(n * width, n * (n + 2))
        self.scales = nn.Parameter(torch.full((3,), 0.01))
        with torch.no_grad():
            self.to_weights.weight.zero_()
            self.to_weights.bias[:n] = math.log(1 / max(n - 1, 0.01))
            self.to_weights.bias[n : 2 * n] = 0
            self.to_weights.bias[2 * n :] = 8 * (torch.eye(n) - 1).flatten()

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all streams of a token together."""
        n = self.streams
        raw = nn.functional.linear(normed(x.movedim(0, -2).flatten(-2)), self.to_weights.weight)
        scale = self.scales.repeat_interleave(
            torch.tensor([n, n, n * n], device=x.device), output_size=n * (n + 2)
        )
        pre, post, residual = (raw * scale + self.to_weights.bias).split([n, n, n * n], -1)
        return pre.sigmoid(), 2 * post.sigmoid(), sinkhorn(residual.unflatten(-1, (n, n)), self.iterations)
