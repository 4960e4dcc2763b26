"""Registry of all kinds of shortcut: name, equation, paper and arguments, built through one signature.

Used by ``add_shortcuts(kind=...)``, ``rewire(kind=...)`` and the contract suite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._validation import require_option
from skipscope.nn._connection import Chain, Elsewhere
from skipscope.nn._dense import DenseShortcut
from skipscope.nn._depth import DepthAveraged, StreamScalars
from skipscope.nn._depth_attention import BlockAttention, DeltaAttention, DepthAttention
from skipscope.nn._dynamic_dense import DynamicDense
from skipscope.nn._dynamic_hyper import (
    CollapsedHyperConnection,
    DynamicHyperConnection,
    GatedStreams,
    ManifoldHyperConnection,
    UnmixedHyperConnection,
)
from skipscope.nn._fixup import Fixup
from skipscope.nn._frac import FracConnection
from skipscope.nn._gated import ExclusiveGate, Highway, ShortcutOnlyGate, VarianceGate
from skipscope.nn._gru_gate import GRUGate
from skipscope.nn._hyper import AltUp, HyperConnected, HyperConnection, StreamConnection
from skipscope.nn._identity import IdentityShortcut, PostActivation, PreActivation
from skipscope.nn._laurel import LaurelLowRank, LaurelPrevious, LaurelWeights
from skipscope.nn._learned_scale import AffineResidual, LayerScale, ReZero, SkipInit
from skipscope.nn._norms import Admin, DeepNorm, Keel, PostNorm, PreNorm, SandwichNorm, SubNorm
from skipscope.nn._parallel import ParallelBranches
from skipscope.nn._residual_streams import ResidualStreams
from skipscope.nn._reversible import Reversible
from skipscope.nn._scaled import DepthScaled, ScaledShortcut
from skipscope.nn._shake import ShakeShake, permuted_copy
from skipscope.nn._shape_shortcuts import PadShortcut, ProjectionShortcut
from skipscope.nn._stochastic import DropoutShortcut, StochasticDepth


@dataclass(frozen=True)
class Kind:
    """A kind of shortcut: its equation, its paper, and a factory for its modules.

    Attributes:
        name: its name in ``add_shortcuts``, ``rewire`` and ``registry``.
        module: its class.
        equation: the output y from the input x and the branch F.
        paper: authors, year, arXiv number or repository.
        keeps_width: whether the output is as wide as the input.
        own_branches: whether it creates a second branch from the first.

    Example:
        >>> import torch
        >>> kind = registry()["rezero"]
        >>> kind.equation, kind.spans_depth
        ('y = x + a F(x), a = 0 at the start', False)
        >>> kind(nn.Linear(4, 4), 4)(torch.ones(2, 4)).unique().tolist()
        [1.0]
    """

    name: str
    module: type[nn.Module]
    equation: str
    paper: str
    keeps_width: bool = True
    own_branches: bool = False
    _make: Callable[..., nn.Module] | None = None

    @property
    def spans_depth(self) -> bool:
        """Whether it joins a whole chain of branches, and not a single branch."""
        return issubclass(self.module, Chain | StreamConnection)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments specific to the kind -> their defaults."""
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
        """Build a module of this kind around a branch that keeps ``width``, or around a chain of branches.

        Args:
            branch: F; for a kind that spans depth, all branches of the chain in order (a single module is a
                chain of one).
            width: size of dimension ``dim``.
            dim: the dimension that holds the features; 1 for images.
            depth: number of branches in the network.
            arguments: arguments specific to the kind; see the property ``arguments``.

        Raises:
            SkipscopeError: several branches for a kind that takes one, or an argument that the kind does not
                have.
        """
        unknown = arguments.keys() - self.arguments.keys()
        if unknown:
            raise SkipscopeError(
                "skipscope.nn",
                f"the kind {self.name!r} has no such argument",
                got=", ".join(sorted(unknown)),
                expected=", ".join(self.arguments) or "none",
                cure=f"skipscope.nn.registry()[{self.name!r}].arguments",
            )
        branches = [branch] if isinstance(branch, nn.Module) else list(branch)
        if len(branches) != 1 and not self.spans_depth:
            raise SkipscopeError(
                "skipscope.nn",
                f"the kind {self.name!r} goes around one branch",
                expected="one module",
                got=f"{len(branches)} modules",
                cure="build one for each branch, or nn.Sequential(*branches)",
            )
        if self._make is not None:
            return self._make(*branches, width, dim, depth, **arguments)
        known = {"width": width, "dim": dim, "depth": depth, "layers": _layers(depth)}
        takes = inspect.signature(self.module.__init__).parameters
        given: dict[str, Any] = {name: value for name, value in known.items() if name in takes} | arguments
        if issubclass(self.module, StreamConnection):
            streams = given.pop("streams", 4)
            return HyperConnected(*branches, streams=streams, connect=partial(self.module, **given))
        if getattr(self.module, "of_blocks", False):
            branches = list(map(IdentityShortcut, branches))
        return self.module(*branches, **given)


# Arguments that `Kind.__call__` sets itself, so they are not among a kind's own.
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


def _layers(depth: int) -> int:
    """The number of layers of two branches each, at least 1."""
    return max(1, depth // 2)


def _deep_norm(branch: nn.Module, width: int, dim: int, depth: int, **own: Any) -> nn.Module:
    made = DeepNorm(branch, width, _layers(depth), dim=dim, **own)
    if not isinstance(branch, Elsewhere):
        made.initialise_(branch)
    return made


_HE_2015, _HE_2016 = "He et al. 2015, arXiv 1512.03385", "He et al. 2016, arXiv 1603.05027"
_XIE_2025 = "Xie et al. 2025, arXiv 2512.24880"
_STREAMS = "X' = H(X) X + h(X) F(w(X) . X), n streams"

_KINDS = (
    Kind("identity", IdentityShortcut, "y = x + F(x)", _HE_2015),
    Kind("post-activation", PostActivation, "y = relu(x + F(x))", _HE_2015),
    Kind("pre-activation", PreActivation, "y = x + F(relu(N(x)))", _HE_2016),
    Kind("pad", PadShortcut, "y = pad(x[::stride]) + F(x)", f"{_HE_2015}, option A"),
    Kind("projection", ProjectionShortcut, "y = W x + F(x)", f"{_HE_2015}, options B and C"),
    Kind("scaled", ScaledShortcut, "y = a x + b F(x), a = b = 1/2", f"{_HE_2016}, section 3.1"),
    Kind("depth-scaled", DepthScaled, "y = x + F(x) / sqrt(L)", "Hayou et al. 2021, arXiv 2010.12859"),
    Kind(
        "exclusive-gate",
        ExclusiveGate,
        "y = (1 - g) x + g F(x), g = sigmoid(W x + b), b = -2",
        f"{_HE_2016}, section 3.2",
    ),
    Kind(
        "shortcut-only-gate",
        ShortcutOnlyGate,
        "y = (1 - g) x + F(x), g = sigmoid(W x + b), b = -6",
        f"{_HE_2016}, section 3.3",
    ),
    Kind(
        "highway",
        Highway,
        "y = x + g (F(x) - x), g = sigmoid(W x + b), b = -2",
        "Srivastava et al. 2015, arXiv 1505.00387",
    ),
    Kind(
        "gru-gate",
        GRUGate,
        "y = (1 - z) x + z h: a GRU with state x and input relu(F(N(x)))",
        "Parisotto et al. 2019, arXiv 1910.06764",
    ),
    Kind(
        "variance-gate",
        VarianceGate,
        "y = sqrt(1 - g^2) x + g F(x), g = sigmoid(w / t)",
        "Muse Spark, Meta 2026, in github.com/huggingface/transformers",
    ),
    Kind("dropout", DropoutShortcut, "y = dropout(x) + F(x)", f"{_HE_2016}, section 3.4"),
    Kind(
        "stochastic-depth",
        StochasticDepth,
        "y = x + b F(x) / (1 - p), b ~ Bernoulli(1 - p)",
        "Huang et al. 2016, arXiv 1603.09382",
    ),
    Kind("dense", DenseShortcut, "y = [x, F(x)]", "Huang et al. 2016, arXiv 1608.06993", keeps_width=False),
    Kind("skipinit", SkipInit, "y = x + a F(x), a = 0 at the start", "De and Smith 2020, arXiv 2002.10444"),
    Kind("rezero", ReZero, "y = x + a F(x), a = 0 at the start", "Bachlechner et al. 2020, arXiv 2003.04887"),
    Kind(
        "layer-scale",
        LayerScale,
        "y = x + diag(g) F(x), g = 1e-4 at the start",
        "Touvron et al. 2021, arXiv 2103.17239",
    ),
    Kind(
        "affine",
        AffineResidual,
        "y = s (x + b) + t (F(x) + c), s = t = 1, b = c = 0 at the start",
        "ZAYA1, Zyphra 2026, arXiv 2605.05365",
    ),
    Kind(
        "fixup",
        Fixup,
        "y = x + a F(x + b1) + b2, F's last weights 0, the others times L^(-1/(2m-2))",
        "Zhang et al. 2019, arXiv 1901.09321",
    ),
    Kind("pre-norm", PreNorm, "y = x + F(N(x))", "Xiong et al. 2020, arXiv 2002.04745"),
    Kind("post-norm", PostNorm, "y = N(x + F(x))", "Vaswani et al. 2017, arXiv 1706.03762"),
    Kind(
        "sandwich-norm",
        SandwichNorm,
        "y = x + N'(F(N(x)))",
        "Ding et al. 2021, arXiv 2105.13290; Kim et al. 2025, arXiv 2502.02732",
    ),
    Kind(
        "sub-norm",
        SubNorm,
        "y = x + W N'(G(N(x))), F = W G; F's weights times sqrt(log 2L), L layers of two branches",
        "Wang et al. 2022, arXiv 2210.06423",
    ),
    Kind("keel", Keel, "y = N'(L x + F(N(x)))", "Chen and Wei 2026, arXiv 2601.19895"),
    Kind(
        "deep-norm",
        DeepNorm,
        "y = N(a x + F(x)), a = (2L)^(1/4), F's weights times (8L)^(-1/4), L layers of two branches",
        "Wang et al. 2022, arXiv 2203.00555",
        _make=_deep_norm,
    ),
    Kind("admin", Admin, "y = N(diag(w) x + F(x))", "Liu et al. 2020, arXiv 2004.08249"),
    Kind(
        "parallel",
        ParallelBranches,
        "y = x + F1(N(x)) + F2(N(x))",
        "Chowdhery et al. 2022, arXiv 2204.02311",
        own_branches=True,
        _make=lambda f, width, dim, depth: ParallelBranches(f, permuted_copy(f), width=width, dim=dim),
    ),
    Kind(
        "hyper",
        HyperConnection,
        "X' = H X + h F(w . X), n streams from the first branch to the last (HyperConnected)",
        "Zhu et al. 2024, arXiv 2409.19606",
    ),
    Kind("dynamic-hyper", DynamicHyperConnection, _STREAMS, "Zhu et al. 2024, arXiv 2409.19606, section 2.3"),
    Kind("manifold-hyper", ManifoldHyperConnection, f"{_STREAMS}, H doubly stochastic", _XIE_2025),
    Kind(
        "collapsed-hyper",
        CollapsedHyperConnection,
        f"{_STREAMS}, H doubly stochastic; the output is h(X) . X",
        f"{_XIE_2025}; DeepSeek-V4 in github.com/huggingface/transformers",
    ),
    Kind(
        "unmixed-hyper",
        UnmixedHyperConnection,
        f"{_STREAMS}, H = I; the output is h(X) . X",
        f"{_XIE_2025}; Hunyuan 4 in github.com/huggingface/transformers",
    ),
    Kind(
        "gated-streams",
        GatedStreams,
        "X' = X + h(X) F(mean of G_i(X) RMSNorm(x_i)), n streams, the output such a mean",
        "Qwen4 in github.com/huggingface/transformers",
    ),
    Kind(
        "frac",
        FracConnection,
        "H' = A(H) H + diag(b(H)) F(Y(H) H), H the m parts of x",
        "Zhu et al. 2025, arXiv 2503.14125",
    ),
    Kind(
        "altup",
        AltUp,
        "X^ = P X, X' = X^ + g (x_j + F(x_j) - x^_j), n streams, j the next at each layer",
        "Baykal et al. 2023, arXiv 2301.13310",
    ),
    Kind(
        "residual-streams",
        ResidualStreams,
        "x' = N(x + F(x)), d' = d + F(x); at the end x + N(d)",
        "Xie et al. 2023, arXiv 2304.14802",
    ),
    Kind(
        "shake-shake",
        ShakeShake,
        "y = x + a F1(x) + (1 - a) F2(x), a ~ U(0, 1)",
        "Gastaldi 2017, arXiv 1705.07485",
        own_branches=True,
    ),
    Kind(
        "depth-averaged",
        DepthAveraged,
        "Y_i = sum over j <= i of a_ij X_j, X_i = Y_(i-1) + F_i(Y_(i-1))",
        "Pagliardini et al. 2024, arXiv 2402.02622",
    ),
    Kind(
        "stream-scalars",
        StreamScalars,
        "x_(i+1) = a x_i + b F_i(x_i) + c x_0, a = b = 1, c = 0 at the start",
        "github.com/KellerJordan/modded-nanogpt; github.com/karpathy/nanochat",
    ),
    Kind(
        "depth-attention",
        DepthAttention,
        "h_l = sum over i < l of softmax_i(w_l . RMSNorm(v_i)) v_i, v_l = F_l(h_l)",
        "Kimi Team 2026, arXiv 2603.15031",
    ),
    Kind(
        "block-attention",
        BlockAttention,
        "as depth-attention, each v the sum of a block of branches",
        "Kimi Team 2026, arXiv 2603.15031",
    ),
    Kind(
        "delta-attention",
        DeltaAttention,
        "h_l = s_l + sum over i < l of softmax_i(w_l . RMSNorm(v_i)) v_i, s_l the sum of v",
        "Luo, Cai and Hu 2026, arXiv 2605.18855",
    ),
    Kind(
        "dynamic-dense",
        DynamicDense,
        "Y_i = sum over j <= i of A_ij(X_i) X_j, X_i = Y_(i-1) + F_i(Y_(i-1))",
        "Xiao et al. 2025, arXiv 2502.12170",
    ),
    Kind("reversible", Reversible, "y1 = x1 + F(x2), y2 = x2 + G(y1)", "Gomez et al. 2017, arXiv 1707.04585"),
    Kind("laurel-weights", LaurelWeights, "y = a F(x) + b x", "Menghani et al. 2024, arXiv 2411.07501"),
    Kind(
        "laurel-low-rank",
        LaurelLowRank,
        "y = F(x) + x + W2 W1 x, W2 = 0 at the start",
        "Menghani et al. 2024, arXiv 2411.07501",
    ),
    Kind(
        "laurel-previous",
        LaurelPrevious,
        "x_(i+1) = F_i(x_i) + x_i + W2 W1 (c_0 x_i + c_1 x_(i-1) + ...), W2 = 0 at the start",
        "Menghani et al. 2024, arXiv 2411.07501",
    ),
)


def registry() -> dict[str, Kind]:
    """Every kind of shortcut in this package: name -> :class:`Kind`, which builds its modules.

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


def find_kind(kind: Any, operation: str) -> Kind | None:
    """Look up a kind by its name or its class. None for a user-defined class.

    Raises:
        SkipscopeError: an unknown name, or what makes no module.

    Example:
        >>> find_kind("rezero", "my_function").name
        'rezero'
        >>> find_kind(nn.Linear, "my_function") is None
        True
    """
    if isinstance(kind, str | nn.Module) or not callable(kind):
        require_option(operation, "kind", kind, registry(), "a module class")
        return registry()[str(kind)]
    if kind is HyperConnected:
        return registry()["hyper"]
    return next((known for known in _KINDS if known.module is kind), None)
