"""Every kind of shortcut by name, with its equation, its paper and its own arguments, built alike.

For ``add_shortcuts(kind=...)``, ``rewire(kind=...)`` and the contract suite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from skipscope._errors import SkipscopeError
from skipscope.nn._connection import Elsewhere
from skipscope.nn._dense import DenseShortcut
from skipscope.nn._depth import DepthAveraged
from skipscope.nn._depth_attention import DepthAttention
from skipscope.nn._dynamic_dense import DynamicDense
from skipscope.nn._dynamic_hyper import DynamicHyperConnection, ManifoldHyperConnection
from skipscope.nn._fixup import Fixup
from skipscope.nn._gates import ExclusiveGate, Highway, ShortcutOnlyGate
from skipscope.nn._gru_gate import GRUGate
from skipscope.nn._hyper import HyperConnected, HyperConnection
from skipscope.nn._identity import IdentityShortcut, PostActivation, PreActivation
from skipscope.nn._laurel import LaurelLowRank, LaurelWeights
from skipscope.nn._learned_scale import LayerScale, ReZero, SkipInit
from skipscope.nn._norms import Admin, DeepNorm, PostNorm, PreNorm, SandwichNorm
from skipscope.nn._options import PadShortcut, ProjectionShortcut
from skipscope.nn._parallel import ParallelBranches
from skipscope.nn._random import DropoutShortcut, StochasticDepth
from skipscope.nn._residual_streams import ResidualStreams
from skipscope.nn._reversible import Reversible
from skipscope.nn._scaled import DepthScaled, ScaledShortcut
from skipscope.nn._shake import ShakeShake, anew


@dataclass(frozen=True)
class Kind:
    """A kind of shortcut: what it computes, where it is from, and how a module of it is made.

    Attributes:
        name: as ``add_shortcuts``, ``rewire`` and ``registry`` know it.
        module: its class.
        equation: the output y from the input x and the branch F.
        paper: authors, year, arXiv number.
        spans_depth: it joins the branches of a whole chain; a chain of one says little.
        keeps_width: the output is as wide as the input.
        own_branches: it has a second branch of its own, made from the first.
    """

    name: str
    module: type[nn.Module]
    equation: str
    paper: str
    _make: Callable[..., nn.Module]
    spans_depth: bool = False
    keeps_width: bool = True
    own_branches: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The kind's own arguments by name, with their defaults."""
        own = inspect.signature(self.module.__init__).parameters.values()
        return {p.name: p.default for p in own if p.default is not p.empty and p.name not in _GIVEN}

    def line(self) -> str:
        """One line for ``help(skipscope.nn)``."""
        own = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        chain = ", spans depth" if self.spans_depth else ""
        return f"- {self.name} ({self.module.__name__}{chain}): {self.equation}{own}. {self.paper}."

    def __call__(
        self,
        branch: nn.Module | Sequence[nn.Module],
        width: int,
        *,
        dim: int = -1,
        depth: int = 1,
        **arguments: Any,
    ) -> nn.Module:
        """A module of this kind around a branch that keeps ``width``, or around a chain of branches.

        Args:
            branch: F; for a kind that spans depth all branches of the chain, in order (one alone is a chain of one).
            width: size of dimension ``dim``.
            dim: the dimension that holds the features; 1 for images.
            depth: how many branches the network has.
            arguments: the kind's own, see ``arguments``.

        Raises:
            SkipscopeError: several branches for a kind that takes one, or an argument that the kind does not have.
        """
        unknown = arguments.keys() - self.arguments.keys()
        if unknown:
            raise SkipscopeError(
                "skipscope.nn", f"the kind {self.name!r} has no such argument", got=", ".join(sorted(unknown)),
                expected=", ".join(self.arguments) or "none", cure=f"skipscope.nn.registry()[{self.name!r}].arguments",
            )  # fmt: skip
        branches = [branch] if isinstance(branch, nn.Module) else list(branch)
        if self.spans_depth:
            return self._make(branches, width, dim, depth, **arguments)
        if len(branches) != 1:
            raise SkipscopeError(
                "skipscope.nn", f"the kind {self.name!r} goes around one branch", expected="one module",
                got=f"{len(branches)} modules", cure="build one for each branch, or nn.Sequential(*branches)",
            )  # fmt: skip
        return self._make(branches[0], width, dim, depth, **arguments)


# What `Kind.__call__` hands to every kind that takes it, and what is no choice of the user's.
_GIVEN = {
    "self",
    "branch",
    "branches",
    "blocks",
    "width",
    "dim",
    "depth",
    "layers",
    "layer",
    "connect",
    "ways",
}


def _deep_norm(branch: nn.Module, width: int, dim: int, depth: int, **own: Any) -> nn.Module:
    made = DeepNorm(branch, width, max(1, depth // 2), dim=dim, **own)
    if not isinstance(branch, Elsewhere):
        made.initialise_(branch)
    return made


_KINDS = (
    Kind(
        "identity", IdentityShortcut, "y = x + F(x)", "He et al. 2015, arXiv 1512.03385",
        lambda f, width, dim, depth: IdentityShortcut(f),
    ),
    Kind(
        "post-activation", PostActivation, "y = relu(x + F(x))", "He et al. 2015, arXiv 1512.03385",
        lambda f, width, dim, depth: PostActivation(f),
    ),
    Kind(
        "pre-activation", PreActivation, "y = x + F(relu(N(x)))", "He et al. 2016, arXiv 1603.05027",
        lambda f, width, dim, depth, **own: PreActivation(f, width, dim=dim, **own),
    ),
    Kind(
        "pad", PadShortcut, "y = pad(x[::stride]) + F(x)", "He et al. 2015, arXiv 1512.03385, option A",
        lambda f, width, dim, depth, **own: PadShortcut(f, width, dim=dim, **own),
    ),
    Kind(
        "projection", ProjectionShortcut, "y = W x + F(x)", "He et al. 2015, arXiv 1512.03385, options B and C",
        lambda f, width, dim, depth, **own: ProjectionShortcut(f, width, dim=dim, **own),
    ),
    Kind(
        "scaled", ScaledShortcut, "y = a x + b F(x), a = b = 1/2", "He et al. 2016, arXiv 1603.05027, section 3.1",
        lambda f, width, dim, depth, **own: ScaledShortcut(f, **own),
    ),
    Kind(
        "depth-scaled", DepthScaled, "y = x + F(x) / sqrt(L)", "Hayou et al. 2021, arXiv 2010.12859",
        lambda f, width, dim, depth: DepthScaled(f, depth),
    ),
    Kind(
        "exclusive-gate", ExclusiveGate, "y = (1 - g) x + g F(x), g = sigmoid(W x + b), b = -2",
        "He et al. 2016, arXiv 1603.05027, section 3.2",
        lambda f, width, dim, depth, **own: ExclusiveGate(f, width, dim=dim, **own),
    ),
    Kind(
        "shortcut-only-gate", ShortcutOnlyGate, "y = (1 - g) x + F(x), g = sigmoid(W x + b), b = -6",
        "He et al. 2016, arXiv 1603.05027, section 3.3",
        lambda f, width, dim, depth, **own: ShortcutOnlyGate(f, width, dim=dim, **own),
    ),
    Kind(
        "highway", Highway, "y = x + g (F(x) - x), g = sigmoid(W x + b), b = -2",
        "Srivastava et al. 2015, arXiv 1505.00387",
        lambda f, width, dim, depth, **own: Highway(f, width, dim=dim, **own),
    ),
    Kind(
        "gru-gate", GRUGate, "y = (1 - z) x + z h: a GRU with state x and input relu(F(N(x)))",
        "Parisotto et al. 2019, arXiv 1910.06764",
        lambda f, width, dim, depth, **own: GRUGate(f, width, dim=dim, **own),
    ),
    Kind(
        "dropout", DropoutShortcut, "y = dropout(x) + F(x)", "He et al. 2016, arXiv 1603.05027, section 3.4",
        lambda f, width, dim, depth, **own: DropoutShortcut(f, **own),
    ),
    Kind(
        "stochastic-depth", StochasticDepth, "y = x + b F(x) / (1 - p), b ~ Bernoulli(1 - p)",
        "Huang et al. 2016, arXiv 1603.09382",
        lambda f, width, dim, depth, **own: StochasticDepth(f, **own),
    ),
    Kind(
        "dense", DenseShortcut, "y = [x, F(x)]", "Huang et al. 2016, arXiv 1608.06993",
        lambda f, width, dim, depth: DenseShortcut(f, dim=dim),
        keeps_width=False,
    ),
    Kind(
        "skipinit", SkipInit, "y = x + a F(x), a = 0 at the start", "De and Smith 2020, arXiv 2002.10444",
        lambda f, width, dim, depth: SkipInit(f),
    ),
    Kind(
        "rezero", ReZero, "y = x + a F(x), a = 0 at the start", "Bachlechner et al. 2020, arXiv 2003.04887",
        lambda f, width, dim, depth: ReZero(f),
    ),
    Kind(
        "layer-scale", LayerScale, "y = x + diag(g) F(x), g = 1e-4 at the start",
        "Touvron et al. 2021, arXiv 2103.17239",
        lambda f, width, dim, depth, **own: LayerScale(f, width, dim=dim, **own),
    ),
    Kind(
        "fixup", Fixup, "y = x + a F(x + b1) + b2, F's last weights 0, the others times L^(-1/(2m-2))",
        "Zhang et al. 2019, arXiv 1901.09321",
        lambda f, width, dim, depth: Fixup(f, depth),
    ),
    Kind(
        "pre-norm", PreNorm, "y = x + F(N(x))", "Xiong et al. 2020, arXiv 2002.04745",
        lambda f, width, dim, depth, **own: PreNorm(f, width, dim=dim, **own),
    ),
    Kind(
        "post-norm", PostNorm, "y = N(x + F(x))", "Vaswani et al. 2017, arXiv 1706.03762",
        lambda f, width, dim, depth, **own: PostNorm(f, width, dim=dim, **own),
    ),
    Kind(
        "sandwich-norm", SandwichNorm, "y = x + N'(F(N(x)))",
        "Ding et al. 2021, arXiv 2105.13290; Kim et al. 2025, arXiv 2502.02732",
        lambda f, width, dim, depth, **own: SandwichNorm(f, width, dim=dim, **own),
    ),
    Kind(
        "deep-norm", DeepNorm, "y = N(a x + F(x)), a = (2L)^(1/4), F's weights times (8L)^(-1/4), L layers of two branches", "Wang et al. 2022, arXiv 2203.00555",
        _deep_norm,
    ),
    Kind(
        "admin", Admin, "y = N(diag(w) x + F(x))", "Liu et al. 2020, arXiv 2004.08249",
        lambda f, width, dim, depth, **own: Admin(f, width, dim=dim, **own),
    ),
    Kind(
        "parallel", ParallelBranches, "y = x + F1(N(x)) + F2(N(x))", "Chowdhery et al. 2022, arXiv 2204.02311",
        lambda f, width, dim, depth: ParallelBranches(f, anew(f), width=width, dim=dim),
        own_branches=True,
    ),
    Kind(
        "hyper", HyperConnection, "X' = H X + h F(w . X), n streams from the first branch to the last (HyperConnected)",
        "Zhu et al. 2024, arXiv 2409.19606",
        lambda chain, width, dim, depth, **own: _hyper(chain, partial(HyperConnection), **own),
        spans_depth=True,
    ),
    Kind(
        "dynamic-hyper", DynamicHyperConnection, "X' = H(X) X + h(X) F(w(X) . X), n streams",
        "Zhu et al. 2024, arXiv 2409.19606, section 2.3",
        lambda chain, width, dim, depth, **own: _hyper(
            chain, partial(DynamicHyperConnection, width=width, dim=dim), **own
        ),
        spans_depth=True,
    ),
    Kind(
        "manifold-hyper", ManifoldHyperConnection, "X' = H(X) X + h(X) F(w(X) . X), H doubly stochastic, n streams",
        "Xie et al. 2025, arXiv 2512.24880",
        lambda chain, width, dim, depth, **own: _hyper(
            chain, partial(ManifoldHyperConnection, width=width, dim=dim), **own
        ),
        spans_depth=True,
    ),
    Kind(
        "residual-streams", ResidualStreams, "x' = N(x + F(x)), d' = d + F(x); at the end x + N(d)",
        "Xie et al. 2023, arXiv 2304.14802",
        lambda chain, width, dim, depth: ResidualStreams(*chain, width=width, dim=dim),
        spans_depth=True,
    ),
    Kind(
        "shake-shake", ShakeShake, "y = x + a F1(x) + (1 - a) F2(x), a ~ U(0, 1)",
        "Gastaldi 2017, arXiv 1705.07485",
        lambda f, width, dim, depth, **own: ShakeShake(f, **own),
        own_branches=True,
    ),
    Kind(
        "depth-averaged", DepthAveraged, "Y_i = sum over j <= i of a_ij X_j, X_i = Y_(i-1) + F_i(Y_(i-1))",
        "Pagliardini et al. 2024, arXiv 2402.02622",
        lambda chain, width, dim, depth: DepthAveraged(*map(IdentityShortcut, chain)),
        spans_depth=True,
    ),
    Kind(
        "depth-attention", DepthAttention, "h_l = sum over i < l of softmax_i(w_l . RMSNorm(v_i)) v_i, v_l = F_l(h_l)",
        "Kimi Team 2026, arXiv 2603.15031",
        lambda chain, width, dim, depth: DepthAttention(*chain, width=width, dim=dim),
        spans_depth=True,
    ),
    Kind(
        "dynamic-dense", DynamicDense, "Y_i = sum over j <= i of A_ij(X_i) X_j, X_i = Y_(i-1) + F_i(Y_(i-1))",
        "Xiao et al. 2025, arXiv 2502.12170",
        lambda chain, width, dim, depth: DynamicDense(*map(IdentityShortcut, chain), width=width, dim=dim),
        spans_depth=True,
    ),
    Kind(
        "reversible", Reversible, "y1 = x1 + F(x2), y2 = x2 + G(y1)",
        "Gomez et al. 2017, arXiv 1707.04585",
        lambda chain, width, dim, depth: Reversible(*chain),
        spans_depth=True,
    ),
    Kind(
        "laurel-weights", LaurelWeights, "y = a F(x) + b x", "Menghani et al. 2024, arXiv 2411.07501",
        lambda f, width, dim, depth: LaurelWeights(f),
    ),
    Kind(
        "laurel-low-rank", LaurelLowRank, "y = F(x) + x + W2 W1 x, W2 = 0 at the start",
        "Menghani et al. 2024, arXiv 2411.07501",
        lambda f, width, dim, depth, **own: LaurelLowRank(f, width, dim=dim, **own),
    ),
)  # fmt: skip


def _hyper(chain: list[nn.Module], connection: partial[Any], streams: int = 4, **own: Any) -> nn.Module:
    return HyperConnected(*chain, streams=streams, connect=partial(connection, **own))


def registry() -> dict[str, Kind]:
    """Every kind of shortcut of this package: name -> :class:`Kind`, which builds a module of it.

    Example:
        >>> import torch
        >>> kind = registry()["highway"]
        >>> kind.equation, kind.arguments
        ('y = x + g (F(x) - x), g = sigmoid(W x + b), b = -2', {'bias': -2.0})
        >>> module = kind(nn.Linear(8, 8), 8, bias=-1.0)
        >>> module(torch.ones(2, 8)).shape, module.kind
        (torch.Size([2, 8]), 'gated')
    """
    return {kind.name: kind for kind in _KINDS}


def find_kind(kind: str | type[nn.Module], operation: str) -> Kind | None:
    """The kind of that name or that class; None for a class of the user's own.

    Raises:
        SkipscopeError: a name that no kind has.
    """
    if isinstance(kind, str):
        if kind not in registry():
            raise SkipscopeError(
                operation, "unknown kind", expected="one of " + ", ".join(registry()) + ", or a module class",
                got=repr(kind),
            )  # fmt: skip
        return registry()[kind]
    if kind is HyperConnected:
        return registry()["hyper"]
    return next((known for known in _KINDS if known.module is kind), None)
