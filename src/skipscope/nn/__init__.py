"""The shortcut modules of the literature: each wraps a branch F, any module.

Each is a thin module, ``write(x, F(read(x)))``, around a pure function; its file's docstring gives the
equation and the paper. ``registry()`` builds all kinds with one signature;
``skipscope.testing.check_shortcut`` tests any shortcut module.

Example:
    >>> import torch
    >>> block = PreNorm(torch.nn.Linear(8, 8), width=8)
    >>> block(torch.ones(2, 8)).shape
    torch.Size([2, 8])
"""

from skipscope.nn._connection import Chain as Chain
from skipscope.nn._connection import Connection as Connection
from skipscope.nn._connection import Elsewhere as Elsewhere
from skipscope.nn._connection import Holder as Holder
from skipscope.nn._connection import Pointwise as Pointwise
from skipscope.nn._connection import WidthNorm as WidthNorm
from skipscope.nn._dense import DenseShortcut as DenseShortcut
from skipscope.nn._dense import dense_shortcut as dense_shortcut
from skipscope.nn._depth import DepthAveraged as DepthAveraged
from skipscope.nn._depth import StreamScalars as StreamScalars
from skipscope.nn._depth import depth_average as depth_average
from skipscope.nn._depth import stream_scalars as stream_scalars
from skipscope.nn._depth_attention import BlockAttention as BlockAttention
from skipscope.nn._depth_attention import DeltaAttention as DeltaAttention
from skipscope.nn._depth_attention import DepthAttention as DepthAttention
from skipscope.nn._depth_attention import depth_attention as depth_attention
from skipscope.nn._dynamic_dense import DynamicDense as DynamicDense
from skipscope.nn._dynamic_dense import dynamic_dense as dynamic_dense
from skipscope.nn._dynamic_hyper import CollapsedHyperConnection as CollapsedHyperConnection
from skipscope.nn._dynamic_hyper import DynamicHyperConnection as DynamicHyperConnection
from skipscope.nn._dynamic_hyper import GatedRead as GatedRead
from skipscope.nn._dynamic_hyper import GatedStreams as GatedStreams
from skipscope.nn._dynamic_hyper import ManifoldHyperConnection as ManifoldHyperConnection
from skipscope.nn._dynamic_hyper import StreamCollapse as StreamCollapse
from skipscope.nn._dynamic_hyper import UnmixedHyperConnection as UnmixedHyperConnection
from skipscope.nn._dynamic_hyper import mix_streams as mix_streams
from skipscope.nn._dynamic_hyper import sinkhorn as sinkhorn
from skipscope.nn._dynamic_hyper import spread_branch as spread_branch
from skipscope.nn._dynamic_hyper import weigh_streams as weigh_streams
from skipscope.nn._fixup import Fixup as Fixup
from skipscope.nn._fixup import fixup_ as fixup_
from skipscope.nn._frac import FracConnection as FracConnection
from skipscope.nn._gated import ExclusiveGate as ExclusiveGate
from skipscope.nn._gated import Highway as Highway
from skipscope.nn._gated import ShortcutOnlyGate as ShortcutOnlyGate
from skipscope.nn._gated import VarianceGate as VarianceGate
from skipscope.nn._gated import exclusive_gate as exclusive_gate
from skipscope.nn._gated import highway as highway
from skipscope.nn._gated import shortcut_only_gate as shortcut_only_gate
from skipscope.nn._gated import variance_gate as variance_gate
from skipscope.nn._gru_gate import GRUGate as GRUGate
from skipscope.nn._hyper import AltUp as AltUp
from skipscope.nn._hyper import HyperConnected as HyperConnected
from skipscope.nn._hyper import HyperConnection as HyperConnection
from skipscope.nn._hyper import StreamConnection as StreamConnection
from skipscope.nn._hyper import altup as altup
from skipscope.nn._hyper import expand_streams as expand_streams
from skipscope.nn._hyper import hyper_read as hyper_read
from skipscope.nn._hyper import hyper_write as hyper_write
from skipscope.nn._hyper import reduce_streams as reduce_streams
from skipscope.nn._identity import IdentityShortcut as IdentityShortcut
from skipscope.nn._identity import PostActivation as PostActivation
from skipscope.nn._identity import PreActivation as PreActivation
from skipscope.nn._identity import identity_shortcut as identity_shortcut
from skipscope.nn._laurel import LaurelLowRank as LaurelLowRank
from skipscope.nn._laurel import LaurelPrevious as LaurelPrevious
from skipscope.nn._laurel import LaurelWeights as LaurelWeights
from skipscope.nn._laurel import laurel_low_rank as laurel_low_rank
from skipscope.nn._laurel import laurel_weights as laurel_weights
from skipscope.nn._learned_scale import AffineResidual as AffineResidual
from skipscope.nn._learned_scale import LayerScale as LayerScale
from skipscope.nn._learned_scale import ReZero as ReZero
from skipscope.nn._learned_scale import SkipInit as SkipInit
from skipscope.nn._learned_scale import affine_residual as affine_residual
from skipscope.nn._learned_scale import layer_scale as layer_scale
from skipscope.nn._learned_scale import rezero as rezero
from skipscope.nn._norms import Admin as Admin
from skipscope.nn._norms import DeepNorm as DeepNorm
from skipscope.nn._norms import Keel as Keel
from skipscope.nn._norms import PostNorm as PostNorm
from skipscope.nn._norms import PreNorm as PreNorm
from skipscope.nn._norms import SandwichNorm as SandwichNorm
from skipscope.nn._norms import SubNorm as SubNorm
from skipscope.nn._norms import admin_ as admin_
from skipscope.nn._norms import deep_norm_ as deep_norm_
from skipscope.nn._norms import deep_norm_constants as deep_norm_constants
from skipscope.nn._norms import sub_norm_gain as sub_norm_gain
from skipscope.nn._parallel import ParallelBranches as ParallelBranches
from skipscope.nn._registry import Kind as Kind
from skipscope.nn._registry import find_kind as find_kind
from skipscope.nn._registry import registry as registry
from skipscope.nn._residual_streams import ResidualStreams as ResidualStreams
from skipscope.nn._residual_streams import residual_streams as residual_streams
from skipscope.nn._reversible import Reversible as Reversible
from skipscope.nn._reversible import reversed_from as reversed_from
from skipscope.nn._reversible import reversible as reversible
from skipscope.nn._scaled import DepthScaled as DepthScaled
from skipscope.nn._scaled import ScaledShortcut as ScaledShortcut
from skipscope.nn._scaled import scaled_shortcut as scaled_shortcut
from skipscope.nn._shake import ShakeShake as ShakeShake
from skipscope.nn._shake import shake_shake as shake_shake
from skipscope.nn._shape_shortcuts import PadShortcut as PadShortcut
from skipscope.nn._shape_shortcuts import ProjectionShortcut as ProjectionShortcut
from skipscope.nn._shape_shortcuts import option as option
from skipscope.nn._shape_shortcuts import pad_shortcut as pad_shortcut
from skipscope.nn._stochastic import DropoutShortcut as DropoutShortcut
from skipscope.nn._stochastic import StochasticDepth as StochasticDepth
from skipscope.nn._stochastic import dropout_shortcut as dropout_shortcut
from skipscope.nn._stochastic import stochastic_depth as stochastic_depth
from skipscope.nn._value_residual import ValueResidual as ValueResidual
from skipscope.nn._value_residual import ValueResidualAttention as ValueResidualAttention
from skipscope.nn._value_residual import value_residual as value_residual

assert __doc__ is not None
__doc__ += "\n\nKinds, each with its class, equation, own arguments and paper:\n\n" + "\n".join(
    kind.line() for kind in registry().values()
)
