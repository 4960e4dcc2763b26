"""Several residual streams, with weights that depend on the data.

dynamic         X' = H_res(X) X + h_post(X) F(h_pre(X) . X)     Zhu et al. 2024, arXiv 2409.19606, section 2.3
                each weight is static + s tanh(norm(X) W): W = 0 at the start, s = 0.01
mHC             the same equation with doubly stochastic H_res  Xie et al. 2025, arXiv 2512.24880, section 4
                from x = RMSNorm of all streams side by side, with a = 0.01 at the start:
                h_pre = sigmoid(a x W + b), h_post = 2 sigmoid(a x W + b), H_res = Sinkhorn(exp(a x W + b))
  collapsed     the output is h . X, h = sigmoid(a x W + b), instead of the mean: DeepSeek-V4
                (transformers, deepseek_v4)
  unmixed       H_res = I, the output as in collapsed: Hunyuan 4 (transformers, hy_v4)
gated streams   X' = X + h_post(X) F(mean of the G_i(X) U_i)    Qwen4 (transformers, qwen4_exp)
                U_i = RMSNorm(x_i), and u all U concatenated: G = sigmoid(W2 silu(W1 u / n)) per feature,
                h_post = 2 sigmoid(W u / n); the output is the mean of G U with other weights

Like static hyper-connections, all but the last start as a residual network, as long as the streams are copies
of each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from skipscope.nn._connection import normed
from skipscope.nn._hyper import StreamConnection


def mix_streams(x: Tensor, residual: Tensor) -> Tensor:
    """Mix streams ``x [n, ..., width]`` with one matrix per token, ``residual [..., n, n]``.

    Row i gives the weights of the new stream i.

    Example:
        >>> streams = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]])  # two streams of one token
        >>> mix_streams(streams, torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]))
        tensor([[[3., 3.]],
        <BLANKLINE>
                [[2., 2.]]])
    """
    return (residual.movedim(-1, 0).unsqueeze(-1) * x.unsqueeze(-2)).sum(0).movedim(-2, 0)


def weigh_streams(x: Tensor, pre: Tensor) -> Tensor:
    """The branch's input: ``x [n, ..., width]`` summed with weights ``pre [..., n]``.

    Example:
        >>> streams = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]])  # two streams of one token
        >>> weigh_streams(streams, torch.tensor([[0.5, 0.5]]))
        tensor([[2., 2.]])
    """
    return (pre.movedim(-1, 0).unsqueeze(-1) * x).sum(0)


def spread_branch(f: Tensor, post: Tensor) -> Tensor:
    """Copy the branch's output ``f [..., width]`` to n streams, each times its weight in ``post [..., n]``.

    Example:
        >>> spread_branch(torch.ones(1, 3), torch.tensor([[1.0, 2.0]])).squeeze(1)
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """
    return post.movedim(-1, 0).unsqueeze(-1) * f


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Make ``exp(logits [..., n, n])`` doubly stochastic: divide columns and rows by their sums in turn.

    Example:
        >>> matrix = sinkhorn(torch.randn(3, 3))
        >>> one = torch.ones(3)
        >>> torch.allclose(matrix.sum(-1), one), torch.allclose(matrix.sum(-2), one, atol=1e-3)
        (True, True)
    """
    matrix = logits.softmax(-2)  # the exponential and the first division, without overflow
    matrix = matrix / matrix.sum(-1, keepdim=True)
    for _ in range(iterations - 1):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def side_by_side(x: Tensor) -> Tensor:
    """Concatenate streams along the features: ``[n, ..., width]`` -> ``[..., n width]``."""
    return x.movedim(0, -2).flatten(-2)


class _Dynamic(StreamConnection):
    """Base of connections of streams ``[n, ...]`` with features in dimension ``dim`` of each stream.

    Subclasses define ``weights``.
    """

    kind = "gated"

    def __init__(self, branch: nn.Module, streams: int, width: int, dim: int):
        super().__init__(branch)
        self.streams, self.width, self.dim = streams, width, dim

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weights for streams ``[n, ..., width]``: pre and post ``[..., n]``, and residual ``[..., n, n]``.

        A residual of None is the identity.
        """
        raise NotImplementedError

    def weigh(self, rows: Tensor) -> Tensor:
        """The branch's input from streams with features last."""
        return weigh_streams(rows, self.weights(rows)[0])

    def read(self, x: Tensor) -> Tensor:
        """``h_pre(X) . X``."""
        return self.weigh(features_last(x, self.dim)).movedim(-1, self.dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``H_res(X) X + h_post(X) f``."""
        rows = features_last(x, self.dim)
        _, post, residual = self.weights(rows)
        kept = rows if residual is None else mix_streams(rows, residual)
        new = kept + spread_branch(f.movedim(self.dim, -1), post)
        return new if self.dim < 0 else new.movedim(-1, self.dim + 1)


def features_last(x: Tensor, dim: int) -> Tensor:
    """Move dimension ``dim`` of each stream in ``[n, ...]`` to the end."""
    return x if dim < 0 else x.movedim(dim + 1, -1)


class DynamicHyperConnection(_Dynamic):
    """``X' = H_res(X) X + h_post(X) F(h_pre(X) . X)``: static weights, plus small ones from the data.

    Args:
        branch: F, on one stream.
        streams: n.
        width: size of dimension ``dim``.
        layer: index of this layer in the network; selects the stream that is read at the start.
        dim: the dimension of a stream that holds the features.

    Example:
        >>> connection = DynamicHyperConnection(nn.Identity(), streams=2, width=4)
        >>> connection(torch.ones(2, 3, 4)).unique().detach()  # at the start, as x + F(x)
        tensor([2.])
    """

    def __init__(self, branch: nn.Module, streams: int = 4, *, width: int, layer: int = 0, dim: int = -1):
        super().__init__(branch, streams, width, dim)
        self.norm = nn.LayerNorm(width)
        self.pre = nn.Parameter(torch.eye(streams)[layer % streams])
        self.post = nn.Parameter(torch.ones(streams))
        self.residual = nn.Parameter(torch.eye(streams))
        self.to_pre = nn.Parameter(torch.zeros(width))
        self.to_post = nn.Parameter(torch.zeros(width))
        self.to_residual = nn.Parameter(torch.zeros(streams, width))
        self.scale, self.scale_post = (nn.Parameter(torch.tensor(0.01)) for _ in range(2))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights; those of a stream (read, write, mixing) are computed from that stream alone."""
        rows = self.norm(x)
        pre = self.pre + self.scale * torch.tanh(rows @ self.to_pre).movedim(0, -1)
        post = self.post + self.scale_post * torch.tanh(rows @ self.to_post).movedim(0, -1)
        residual = self.residual + self.scale * torch.tanh(rows @ self.to_residual.T).movedim(0, -1)
        return pre, post, residual


class _OfAllStreams(nn.Linear):
    """``x W + b`` with x the RMSNorm of all streams concatenated; W and b are 0 at the start."""

    def __init__(self, streams: int, width: int, *sizes: int):
        super().__init__(streams * width, sum(sizes))
        self.sizes = list(sizes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """Streams ``[n, ..., width]`` -> ``a x W + b`` in parts ``[..., size]``, each with its own a."""
        parts = nn.functional.linear(normed(side_by_side(x)), self.weight).split(self.sizes, -1)
        biases = self.bias.split(self.sizes)
        return tuple(a * part + b for a, part, b in zip(scales, parts, biases, strict=True))


def _mean_logit(streams: int) -> float:
    """The logit at which a sigmoid is 1/n (for one stream, nearly 1)."""
    return math.log(1 / max(streams - 1, 0.01))


class ManifoldHyperConnection(_Dynamic):
    """mHC: ``X' = H_res(X) X + h_post(X) F(h_pre(X) . X)``, ``H_res`` doubly stochastic, weights positive.

    The initial a is the paper's. The initial W and b are ours: W = 0, and b such that every stream is read
    with weight 1/n, receives the branch with weight 1, and hardly mixes.

    Args:
        branch: F, on one stream.
        streams: n.
        width: size of dimension ``dim``.
        layer: ignored; accepted for a common signature.
        dim: the dimension of a stream that holds the features.
        iterations: number of iterations of the Sinkhorn-Knopp algorithm.

    Example:
        >>> connection = ManifoldHyperConnection(nn.Identity(), streams=2, width=4)
        >>> pre, post, residual = connection.weights(torch.randn(2, 3, 4))
        >>> bool((pre > 0).all()), torch.allclose(residual.sum(-1), torch.ones(3, 2))
        (True, True)
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
        super().__init__(branch, streams, width, dim)
        self.iterations = iterations
        self.to_weights = _OfAllStreams(streams, width, streams, streams, streams**2)
        self.scales = nn.Parameter(torch.full((3,), 0.01))
        with torch.no_grad():
            pre, _, residual = self.to_weights.bias.split(self.to_weights.sizes)
            pre.fill_(_mean_logit(streams))
            residual.copy_(8 * (torch.eye(streams) - 1).flatten())

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights, computed from all streams of a token together."""
        pre, post, residual = self.to_weights(x, self.scales)
        matrix = sinkhorn(residual.unflatten(-1, (self.streams, self.streams)), self.iterations)
        return pre.sigmoid(), 2 * post.sigmoid(), matrix


class StreamCollapse(nn.Module):
    """``h(X) . X``, ``h = sigmoid(a x W + b)``: a weighted sum of all streams; their mean at the start.

    Args:
        streams: n.
        width: size of dimension ``dim``.
        dim: the dimension of a stream that holds the features.

    Example:
        >>> StreamCollapse(2, 4)(torch.ones(2, 3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, streams: int, width: int, *, dim: int = -1):
        super().__init__()
        self.dim = dim
        self.to_weights, self.scales = (
            _OfAllStreams(streams, width, streams),
            nn.Parameter(torch.full((1,), 0.01)),
        )
        nn.init.constant_(self.to_weights.bias, _mean_logit(streams))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, ...]`` -> ``[...]``."""
        rows = features_last(x, self.dim)
        return weigh_streams(rows, self.to_weights(rows, self.scales)[0].sigmoid()).movedim(-1, self.dim)


class CollapsedHyperConnection(ManifoldHyperConnection):
    """mHC whose streams end in a :class:`StreamCollapse`.

    Arguments as for :class:`ManifoldHyperConnection`.

    Example:
        >>> connection = CollapsedHyperConnection(nn.Identity(), streams=2, width=4)
        >>> connection.collapse()(torch.ones(2, 3, 4)).shape
        torch.Size([3, 4])
    """

    def collapse(self) -> nn.Module:
        """The learned sum of all streams."""
        return StreamCollapse(self.streams, self.width, dim=self.dim)


class UnmixedHyperConnection(_Dynamic):
    """mHC without mixing, ``X' = X + h_post(X) F(h_pre(X) . X)``, that ends in a :class:`StreamCollapse`.

    Args:
        branch: F, on one stream.
        streams: n.
        width: size of dimension ``dim``.
        layer: ignored; accepted for a common signature.
        dim: the dimension of a stream that holds the features.

    Example:
        >>> connection = UnmixedHyperConnection(nn.Linear(4, 4), streams=2, width=4)
        >>> connection(torch.ones(2, 3, 4)).shape, connection.weights(torch.ones(2, 3, 4))[2]
        (torch.Size([2, 3, 4]), None)
    """

    kind = "identity"

    def __init__(self, branch: nn.Module, streams: int = 4, *, width: int, layer: int = 0, dim: int = -1):
        super().__init__(branch, streams, width, dim)
        self.to_weights = _OfAllStreams(streams, width, streams, streams)
        self.scales = nn.Parameter(torch.full((2,), 0.01))
        nn.init.constant_(self.to_weights.bias[:streams], _mean_logit(streams))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """The weights, computed from all streams of a token together."""
        pre, post = self.to_weights(x, self.scales)
        return pre.sigmoid(), 2 * post.sigmoid(), None

    def collapse(self) -> nn.Module:
        """The learned sum of all streams."""
        return StreamCollapse(self.streams, self.width, dim=self.dim)


class GatedRead(nn.Module):
    """``mean over i of G_i(X) U_i``, ``U_i = RMSNorm(x_i)``, with a gate G for each stream and feature.

    Args:
        streams: n.
        width: size of dimension ``dim``.
        rank: rank of the map from all streams to G.
        dim: the dimension of a stream that holds the features.

    Example:
        >>> GatedRead(2, 4, rank=1)(torch.ones(2, 3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, streams: int, width: int, rank: int, *, dim: int = -1):
        super().__init__()
        self.streams, self.dim = streams, dim
        self.gain = nn.Parameter(torch.ones(streams * width))
        self.down = nn.Linear(streams * width, rank, bias=False)
        self.up = nn.Linear(rank, streams * width, bias=False)

    def normed(self, rows: Tensor) -> Tensor:
        """All U concatenated, ``[..., n width]``."""
        return side_by_side(normed(rows)) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        """``[n, ...]`` -> ``[...]``."""
        u = self.normed(features_last(x, self.dim))
        gate = torch.sigmoid(self.up(nn.functional.silu(self.down(u) / self.streams)))
        return (gate * u).unflatten(-1, (self.streams, -1)).mean(-2).movedim(-1, self.dim)


class GatedStreams(_Dynamic):
    """``X' = X + h_post(X) F(mean over i of G_i(X) U_i)``: each feature of each stream has a gate.

    Args:
        branch: F, on one stream; its input is normalised.
        streams: n.
        width: size of dimension ``dim``.
        layer: ignored; accepted for a common signature.
        rank: rank of the map from all streams to the gates.
        dim: the dimension of a stream that holds the features.

    Example:
        >>> connection = GatedStreams(nn.Linear(4, 4), streams=2, width=4)
        >>> connection(torch.ones(2, 3, 4)).shape, connection.collapse()(torch.ones(2, 3, 4)).shape
        (torch.Size([2, 3, 4]), torch.Size([3, 4]))
    """

    kind = "identity"

    def __init__(
        self, branch: nn.Module, streams: int = 4, *, width: int, layer: int = 0, rank: int = 8, dim: int = -1
    ):
        super().__init__(branch, streams, width, dim)
        self.gates = GatedRead(streams, width, rank)
        self.inject = nn.Linear(streams * width, streams, bias=False)

    def weigh(self, rows: Tensor) -> Tensor:
        """The gated mean of all streams."""
        return self.gates(rows)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """``h_post`` as both pre and post; pre is unused, since ``weigh`` applies a gate per feature."""
        post = 2 * torch.sigmoid(self.inject(self.gates.normed(x)) / self.streams)
        return post, post, None

    def collapse(self) -> nn.Module:
        """A gated mean of all streams."""
        return GatedRead(self.streams, self.width, self.gates.down.out_features, dim=self.dim)
