"""The words that options take and results give: for type checkers, the command line and each call's checks.

This file imports nothing, so that help and completion of the command line do not wait for torch.
"""

from typing import Literal

# Of weight space: how a direction is scaled, and which parameters it leaves still.
Normalization = Literal["filter", "layer", "tensor", "none"]
Zeroable = Literal["biases", "norms", "embeddings"]

# Of a loss surface: batch norms away from the weights as found, arithmetic, and who computes the points.
BatchNorm = Literal["frozen", "recalibrate", "batch", "as found"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Engine = Literal["auto", "local", "torchrun", "ray"]

# The quantities that a recorded run keeps for each parameter, and the flow at each boundary.
Quantity = Literal["rms", "mean_abs", "norm", "norm_before_clip", "flow"]

# The gradient at one place; and the modes that the modules of a model are in.
GradientState = Literal["ok", "exact_zero", "underflow", "not_connected", "nonfinite"]
# A recorded run also has weights that are not trained, and steps without some weight; a measurement has
# activations that are not finite, and boundaries that the data do not reach.
RecordedState = GradientState | Literal["frozen", "absent"]
MeasuredState = GradientState | Literal["nonfinite_activation", "not_met"]
ModelMode = Literal["train", "eval", "mixed"]

# The verdict on a flow: its state, the reason in a word, and the optimizers that it hinders. While a training
# runs there may be nothing to judge yet, and every other state is a word of its own.
VerdictState = Literal["healthy", "vanishing", "exploding", "dead", "nonfinite", "unconnected", "cannot tell"]
LiveState = Literal["healthy", "vanishing", "exploding", "dead", "nonfinite", "unconnected", "unknown"]
LiveBasis = Literal["boundary flow", "parameter gradients"]
OptimizerKind = Literal["SGD", "Adam"]
VerdictCause = Literal[
    "none",
    "saturation",
    "gain",
    "inactive",
    "collapse",
    "missing path",
    "underflow",
    "overflow",
    "weights",
    "data",
    "loss",
    "time",
    "branch",
    "one position",
    "head",
    "batch norm",
    "noise",
    "opaque",
    "unexplained",
    # The function that makes NaN.
    "softmax",
    "sqrt",
    "div",
    "log",
    "norm",
]

# Why a step finds no gradients.
MissingCause = Literal["cleared", "no backward", "detached", "replaced", "unused", "zero"]

# The connections of ``skipscope.nn``; a test holds them equal to its registry.
ConnectionKind = Literal[
    "identity",
    "post-activation",
    "pre-activation",
    "pad",
    "projection",
    "scaled",
    "depth-scaled",
    "exclusive-gate",
    "shortcut-only-gate",
    "highway",
    "gru-gate",
    "variance-gate",
    "dropout",
    "stochastic-depth",
    "dense",
    "skipinit",
    "rezero",
    "layer-scale",
    "affine",
    "fixup",
    "pre-norm",
    "post-norm",
    "sandwich-norm",
    "sub-norm",
    "keel",
    "deep-norm",
    "admin",
    "parallel",
    "hyper",
    "dynamic-hyper",
    "manifold-hyper",
    "collapsed-hyper",
    "unmixed-hyper",
    "gated-streams",
    "frac",
    "altup",
    "residual-streams",
    "shake-shake",
    "depth-averaged",
    "stream-scalars",
    "depth-attention",
    "block-attention",
    "delta-attention",
    "dynamic-dense",
    "reversible",
    "laurel-weights",
    "laurel-low-rank",
    "laurel-previous",
]
