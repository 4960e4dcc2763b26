"""Every shortcut module by name, built alike: for ``add_shortcuts(kind=...)`` and for the contract suite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import nn

from skipscope.nn._dense import DenseShortcut
from skipscope.nn._depth import DepthAveraged
from skipscope.nn._depth_attention import DepthAttention
from skipscope.nn._dynamic_dense import DynamicDense
from skipscope.nn._dynamic_hyper import DynamicHyperConnection, ManifoldHyperConnection
from skipscope.nn._fixup import Fixup
from skipscope.nn._gates import ExclusiveGate, Highway, ShortcutOnlyGate
from skipscope.nn._gru_gate import GRUGate
from skipscope.nn._hyper import HyperConnected
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


class Factory(Protocol):
    """Builds a shortcut module around a branch that keeps ``width``."""

    def __call__(self, branch: nn.Module, width: int, *, dim: int = -1, depth: int = 1) -> nn.Module:
        """``dim`` holds the features (1 for images); ``depth`` is how many branches the network has."""
        ...


# Each from the branch, its width, the dimension that holds the features, and the number of branches in the network.
_MAKE: dict[str, Callable[[nn.Module, int, int, int], nn.Module]] = {
    "identity": lambda branch, width, dim, depth: IdentityShortcut(branch),
    "post-activation": lambda branch, width, dim, depth: PostActivation(branch),
    "pre-activation": lambda branch, width, dim, depth: PreActivation(branch, width, dim=dim),
    "pad": lambda branch, width, dim, depth: PadShortcut(branch, width, dim=dim),
    "projection": lambda branch, width, dim, depth: ProjectionShortcut(branch, width, dim=dim),
    "scaled": lambda branch, width, dim, depth: ScaledShortcut(branch),
    "depth-scaled": lambda branch, width, dim, depth: DepthScaled(branch, depth),
    "exclusive-gate": lambda branch, width, dim, depth: ExclusiveGate(branch, width, dim=dim),
    "shortcut-only-gate": lambda branch, width, dim, depth: ShortcutOnlyGate(branch, width, dim=dim),
    "highway": lambda branch, width, dim, depth: Highway(branch, width, dim=dim),
    "gru-gate": lambda branch, width, dim, depth: GRUGate(branch, width, dim=dim),
    "dropout": lambda branch, width, dim, depth: DropoutShortcut(branch),
    "stochastic-depth": lambda branch, width, dim, depth: StochasticDepth(branch),
    "dense": lambda branch, width, dim, depth: DenseShortcut(branch, dim=dim),
    "skipinit": lambda branch, width, dim, depth: SkipInit(branch),
    "rezero": lambda branch, width, dim, depth: ReZero(branch),
    "layer-scale": lambda branch, width, dim, depth: LayerScale(branch, width, dim=dim),
    "fixup": lambda branch, width, dim, depth: Fixup(branch, depth),
    "pre-norm": lambda branch, width, dim, depth: PreNorm(branch, width, dim=dim),
    "post-norm": lambda branch, width, dim, depth: PostNorm(branch, width, dim=dim),
    "sandwich-norm": lambda branch, width, dim, depth: SandwichNorm(branch, width, dim=dim),
    "deep-norm": lambda branch, width, dim, depth: DeepNorm(branch, width, max(1, depth // 2), dim=dim),
    "admin": lambda branch, width, dim, depth: Admin(branch, width, dim=dim),
    "parallel": lambda branch, width, dim, depth: ParallelBranches(
        branch, anew(branch), width=width, dim=dim
    ),
    "hyper": lambda branch, width, dim, depth: HyperConnected(branch),
    "dynamic-hyper": lambda branch, width, dim, depth: HyperConnected(
        branch, connect=partial(DynamicHyperConnection, width=width, dim=dim)
    ),
    "manifold-hyper": lambda branch, width, dim, depth: HyperConnected(
        branch, connect=partial(ManifoldHyperConnection, width=width, dim=dim)
    ),
    "residual-streams": lambda branch, width, dim, depth: ResidualStreams(branch, width=width, dim=dim),
    "shake-shake": lambda branch, width, dim, depth: ShakeShake(branch),
    "depth-averaged": lambda branch, width, dim, depth: DepthAveraged(IdentityShortcut(branch)),
    "depth-attention": lambda branch, width, dim, depth: DepthAttention(branch, width=width, dim=dim),
    "dynamic-dense": lambda branch, width, dim, depth: DynamicDense(
        IdentityShortcut(branch), width=width, dim=dim
    ),
    "reversible": lambda branch, width, dim, depth: Reversible(branch),
    "laurel-weights": lambda branch, width, dim, depth: LaurelWeights(branch),
    "laurel-low-rank": lambda branch, width, dim, depth: LaurelLowRank(branch, width, dim=dim),
}


def registry() -> dict[str, Factory]:
    """Every shortcut module of this package: name -> ``factory(branch, width, *, dim=-1, depth=1)``.

    Example:
        >>> import torch
        >>> module = registry()["highway"](nn.Linear(8, 8), 8)
        >>> module(torch.ones(2, 8)).shape, module.kind
        (torch.Size([2, 8]), 'gated')
    """
    return {name: partial(_build, make) for name, make in _MAKE.items()}


def _build(
    make: Callable[..., nn.Module], branch: nn.Module, width: int, *, dim: int = -1, depth: int = 1
) -> nn.Module:
    return make(branch, width, dim, depth)
