"""Base classes of the shortcut modules: a branch F, and two functions around it.

    y = write(x, F(read(x)))

``read`` computes the branch's input from the incoming streams (all but hyper-connections have one stream, the
tensor x itself); ``write`` joins the branch's output with them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Connection(nn.Module):
    """A branch, and a shortcut around it.

    Attributes:
        kind: the kind that ``find_shortcuts`` reports: identity, scaled, projection, gated or concat.
        identity_at_start: whether, by the paper, a newly initialised module returns its input.

    Example:
        >>> class Halved(Connection):
        ...     def write(self, x, f):
        ...         return x + f / 2
        >>> Halved(nn.Identity())(torch.ones(3))
        tensor([1.5000, 1.5000, 1.5000])
    """

    kind: ClassVar[str] = "identity"
    identity_at_start: ClassVar[bool] = False

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def initialise_(self, branch: nn.Module) -> None:
        """Initialise a branch's weights as in the paper; by default they stay unchanged."""

    def __getattr__(self, name: str) -> Any:
        """Look up a missing attribute in the branch, for code that reads the attributes of its layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            branch = self.__dict__.get("_modules", {}).get("branch")
            if branch is None or name == "reset_parameters" or not hasattr(branch, name):
                raise
            return getattr(branch, name)

    def read(self, x: Tensor) -> Tensor:
        """The branch's input; by default ``x`` itself."""
        return x

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """The output, from the input ``x`` and the branch's output ``f``."""
        return x + f

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """``write(x, F(read(x)))``; further arguments, such as an attention mask, go to the branch."""
        return self.write(x, self.branch(self.read(x), *args, **keywords))


class Chain(nn.Module):
    """A sequence of branches, joined across the whole depth.

    A chain begins with the input x, makes one step per branch, and passes a state from step to step.

    Attributes:
        kind: the kind that ``find_shortcuts`` reports for its merges.
        identity_at_start: whether, by the paper, a newly initialised module returns its input.
        of_blocks: whether its branches are blocks that have shortcuts of their own.
        branches: F_1, F_2, ..., in order.

    Example:
        >>> class Summed(Chain):
        ...     def __init__(self, *branches):
        ...         super().__init__()
        ...         self.branches = nn.ModuleList(branches)
        ...
        ...     def step(self, index, state, f):
        ...         return [*state, f], sum(state) + f
        >>> Summed(nn.Identity(), nn.Identity())(torch.ones(2))  # 1, then 1 + 1, then 1 + 1 + 2
        tensor([4., 4.])
    """

    kind: str = "identity"
    of_blocks: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = False
    branches: Any

    def begin(self, x: Tensor) -> tuple[Any, Any]:
        """The initial state, and the first branch's input (a tuple if it takes several)."""
        return [x], x

    def step(self, index: int, state: Any, f: Tensor) -> tuple[Any, Any]:
        """The state after branch ``index`` returned ``f``, and the next branch's input.

        After the last branch, the state and the output.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """The output, of the shape of ``x``; further arguments go to every branch."""
        state, h = self.begin(x)
        for index, branch in enumerate(self.branches):
            inputs = h if isinstance(h, tuple) else (h,)
            state, h = self.step(index, state, branch(*inputs, *args, **keywords))
        return h


class Elsewhere(nn.Module):
    """Placeholder for a branch computed elsewhere; only its connection's ``read`` and ``write`` are called.

    Example:
        >>> connection = Connection(Elsewhere())
        >>> connection.write(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Raise an error, since there is no branch to run."""
        raise NotImplementedError("this connection has no branch of its own")


class Holder(nn.Module):
    """Container of connections by dotted name, beside a model's own modules; its forward is the identity.

    Example:
        >>> holder = Holder()
        >>> holder.put("layers.0", Connection(nn.Linear(2, 2)))
        >>> list(holder.state_dict())
        ['layers.0.branch.weight', 'layers.0.branch.bias']
    """

    def put(self, name: str, connection: nn.Module) -> None:
        """Register a connection so that its ``state_dict`` keys begin with ``name``."""
        path, _, last = name.rpartition(".")
        holder: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in holder._modules:
                holder._modules[part] = Holder()
            holder = holder._modules[part]  # type: ignore[assignment]
        before = holder._modules.get(last)
        # A connection inside this connection's branch was registered first.
        if before is not None:
            connection._modules.update(
                {k: m for k, m in before._modules.items() if k not in connection._modules}
            )
        holder._modules[last] = connection

    def forward(self, x: Any) -> Any:
        """Return ``x``."""
        return x


# --- layers that act on one dimension ---


class Pointwise(nn.Linear):
    """A linear map of dimension ``dim``: for images (``dim=1``) this is a 1 x 1 convolution.

    Example:
        >>> Pointwise(3, 8, dim=1)(torch.ones(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, width: int, width_out: int | None = None, *, dim: int = -1, bias: bool = True):
        super().__init__(width, width_out or width, bias)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width, ...]`` -> ``[..., width_out, ...]``."""
        return super().forward(x.movedim(self.dim, -1)).movedim(-1, self.dim)


class WidthNorm(nn.LayerNorm):
    """Layer normalisation over dimension ``dim``.

    Example:
        >>> image = torch.randn(2, 3, 5, 5)
        >>> WidthNorm(3, dim=1)(image).mean(1).abs().max() < 1e-5
        tensor(True)
    """

    def __init__(self, width: int, *, dim: int = -1):
        super().__init__(width)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, of the same shape."""
        return super().forward(x.movedim(self.dim, -1)).movedim(-1, self.dim)


def along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Reshape a vector so that it broadcasts along dimension ``dim`` of ``like``."""
    return values if dim in {-1, like.ndim - 1} else values.reshape(-1, *[1] * (like.ndim - 1 - dim))


def normed(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension (RMSNorm without a gain)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def pad_width(x: Tensor, width: int, dim: int) -> Tensor:
    """Zero-pad dimension ``dim`` to ``width``, half of the zeros in front."""
    new = width - x.shape[dim]
    return F.pad(x.movedim(dim, -1), (new // 2, new - new // 2)).movedim(-1, dim)
