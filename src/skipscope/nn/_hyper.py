"""Several residual streams instead of one, with static weights.

hyper-connections   X' = H_res X + h_post F(h_pre . X)                    Zhu et al. 2024, arXiv 2409.19606
AltUp               X^ = P X,   X' = X^ + g (x_j + F(x_j) - x^_j)         Baykal et al. 2023, arXiv 2301.13310
                    predict, compute for stream j, correct; j cycles through the streams from layer to layer
                    (as in Recycled-AltUp, the streams begin as copies). Gemma 3n predicts and corrects in the
                    same form, but a router adds to P and g for each token, and F reads the predicted stream

X holds n streams. At the start H_res and P are the identity, h_post and g are all ones, and h_pre reads one
stream, cycling from layer to layer: then every stream equals the single stream of a residual network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Chain, Connection


def expand_streams(x: Tensor, streams: int) -> Tensor:
    """``[...]`` -> ``[streams, ...]``: n copies of the input.

    Example:
        >>> expand_streams(torch.ones(2, 3), 4).shape
        torch.Size([4, 2, 3])
    """
    return x.expand(streams, *x.shape)


def reduce_streams(x: Tensor) -> Tensor:
    """``[streams, ...]`` -> ``[...]``: the mean over the streams.

    The paper uses the sum; the norm after it removes the factor between the two.

    Example:
        >>> reduce_streams(torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
        tensor([2., 2.])
    """
    return x.mean(0)


def hyper_read(x: Tensor, pre: Tensor) -> Tensor:
    """The branch's input: ``[streams, ...]`` and ``pre [streams]`` -> ``[...]``.

    Example:
        >>> hyper_read(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([0.0, 1.0]))
        tensor([3., 3.])
    """
    return torch.tensordot(pre, x, 1)


def hyper_write(x: Tensor, f: Tensor, residual: Tensor, post: Tensor) -> Tensor:
    """Mix streams ``[n, ...]`` by ``residual [n, n]``, and add ``f [...]`` to each with weights ``post [n]``.

    Example:
        >>> streams = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        >>> hyper_write(streams, torch.ones(2), torch.eye(2), torch.tensor([1.0, 2.0]))
        tensor([[2., 2.],
                [5., 5.]])
    """
    return torch.tensordot(residual, x, 1) + post.reshape(-1, *[1] * f.ndim) * f


def altup(x: Tensor, f: Tensor, predict: Tensor, correct: Tensor, active: int) -> Tensor:
    """AltUp's prediction from the streams ``x [n, ...]``, corrected by the computed ``x[active] + f``.

    Example:
        >>> streams = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        >>> altup(streams, torch.ones(2), torch.eye(2), torch.tensor([1.0, 0.5]), active=0)
        tensor([[2.0000, 2.0000],
                [3.5000, 3.5000]])
    """
    predicted = torch.tensordot(predict, x, 1)
    return predicted + correct.reshape(-1, *[1] * f.ndim) * (x[active] + f - predicted[active])


class StreamConnection(Connection):
    """A connection between streams ``[n, ...]``: one layer of :class:`HyperConnected`.

    Example:
        >>> StreamConnection(nn.Identity()).collapse() is None
        True
    """

    def collapse(self) -> nn.Module | None:
        """A module that reduces the streams to one tensor after the last layer. None for their mean."""
        return None


class HyperConnection(StreamConnection):
    """``X' = H_res X + h_post F(h_pre . X)`` on streams ``[n, ...]``, with learned, static weights.

    A network calls :func:`expand_streams` on its input, and :func:`reduce_streams` after the last layer.

    Args:
        branch: F, on one stream.
        streams: n.
        layer: index of this layer in the network; selects the stream that is read at the start.

    Example:
        >>> connection = HyperConnection(nn.Identity(), streams=2)
        >>> reduce_streams(connection(expand_streams(torch.ones(3), 2))).detach()  # at the start, x + F(x)
        tensor([2., 2., 2.])
    """

    kind = "projection"

    def __init__(self, branch: nn.Module, streams: int = 4, *, layer: int = 0):
        super().__init__(branch)
        self.pre = nn.Parameter(torch.eye(streams)[layer % streams])
        self.residual = nn.Parameter(torch.eye(streams))
        self.post = nn.Parameter(torch.ones(streams))

    def read(self, x: Tensor) -> Tensor:
        """``h_pre . X``."""
        return hyper_read(x, self.pre)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``H_res X + h_post f``."""
        return hyper_write(x, f, self.residual, self.post)


class AltUp(StreamConnection):
    """``X^ + g (x_j + F(x_j) - x^_j)`` with ``X^ = P X``: computes stream j, predicts the others.

    Args:
        branch: F, on one stream.
        streams: n.
        layer: index of this layer in the network; selects the stream that is computed.

    Example:
        >>> connection = AltUp(nn.Identity(), streams=2, layer=1)
        >>> connection.active, connection(torch.ones(2, 3)).shape
        (1, torch.Size([2, 3]))
    """

    kind = "projection"

    def __init__(self, branch: nn.Module, streams: int = 4, *, layer: int = 0):
        super().__init__(branch)
        self.active = layer % streams
        self.predict, self.correct = nn.Parameter(torch.eye(streams)), nn.Parameter(torch.ones(streams))

    def read(self, x: Tensor) -> Tensor:
        """``x_j``."""
        return x[self.active]

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """The corrected prediction, ``X^ + g (x_j + f - x^_j)``."""
        return altup(x, f, self.predict, self.correct, self.active)


class HyperConnected(Chain):
    """A stack of branches joined by hyper-connections: n streams inside, one tensor as input and output.

    Args:
        branches: the F of each layer.
        streams: n.
        connect: builds a layer's connection, called with ``branch, streams, layer=``; for instance
            ``partial(ManifoldHyperConnection, width=64)``.

    Example:
        >>> network = HyperConnected(nn.Identity(), nn.Identity(), streams=2)
        >>> network(torch.ones(3)).detach()  # at the start a residual network: 1, 2, 4
        tensor([4., 4., 4.])
    """

    def __init__(
        self,
        *branches: nn.Module,
        streams: int = 4,
        connect: Callable[..., StreamConnection] = HyperConnection,
    ):
        super().__init__()
        self.streams = streams
        self.layers = nn.ModuleList(connect(branch, streams, layer=i) for i, branch in enumerate(branches))
        self.kind: Any = next((layer.kind for layer in self.layers), HyperConnection.kind)
        self.collapse = self.layers[-1].collapse() if branches else None  # type: ignore[operator]

    @property
    def branches(self) -> list[nn.Module]:
        """The F of each layer."""
        return [layer.branch for layer in self.layers]  # type: ignore[union-attr, return-value]

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The streams, n copies of ``x``, and the first layer's input."""
        x = expand_streams(x, self.streams)
        return x, self.layers[0].read(x)  # type: ignore[operator]

    def step(self, index: int, state: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """The streams after layer ``index``, and the next layer's input; after the last layer, the output."""
        state = self.layers[index].write(state, f)  # type: ignore[operator]
        if index < len(self.layers) - 1:
            return state, self.layers[index + 1].read(state)  # type: ignore[operator]
        return state, reduce_streams(state) if self.collapse is None else self.collapse(state)
