"""A gated recurrent unit instead of the sum: Parisotto et al. 2019 (GTrXL, arXiv 1910.06764), section 3.2.

f = relu(F(N(x))),   r = sigmoid(W_r f + U_r x),   z = sigmoid(W_z f + U_z x - b)
h = tanh(W_g f + U_g (r x)),   y = (1 - z) x + z h;   b = 2 at the start: near the identity
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipscope.nn._connection import Connection, Pointwise, WidthNorm
from skipscope.nn._gated import exclusive_gate


class GRUGate(Connection):
    """``(1 - z) x + z h``, the gate z and candidate h of a GRU with state ``x`` and input F.

    Args:
        branch: F, on the normalised input.
        width: size of dimension ``dim``.
        bias: b; a greater b lets more of x pass at the start.
        dim: the dimension that holds the features.

    Example:
        >>> GRUGate(nn.Linear(4, 4), 4)(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    kind = "gated"

    def __init__(self, branch: nn.Module, width: int, *, bias: float = 2.0, dim: int = -1):
        super().__init__(branch)
        self.norm = WidthNorm(width, dim=dim)
        self.of_branch = nn.ModuleDict({name: Pointwise(width, dim=dim, bias=name == "z") for name in _PARTS})
        self.of_state = nn.ModuleDict({name: Pointwise(width, dim=dim, bias=False) for name in _PARTS})
        nn.init.constant_(self.of_branch["z"].bias, -bias)  # type: ignore[arg-type]

    def read(self, x: Tensor) -> Tensor:
        """``N(x)``."""
        return self.norm(x)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``(1 - z) x + z h``."""
        f = f.relu()
        reset = torch.sigmoid(self.of_branch["r"](f) + self.of_state["r"](x))
        update = torch.sigmoid(self.of_branch["z"](f) + self.of_state["z"](x))
        candidate = torch.tanh(self.of_branch["g"](f) + self.of_state["g"](reset * x))
        return exclusive_gate(x, candidate, update)


_PARTS = ("r", "z", "g")
