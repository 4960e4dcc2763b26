"""Literal types of options and of states in results, for type checkers, the command line and validation.

This file imports nothing heavy, so that help and completion of the command line do not wait for torch.
"""

from typing import Literal

# Scaling of directions in weight space, and parameters whose direction can be set to zero.
Normalization = Literal["filter", "layer", "tensor", "none"]
Zeroable = Literal["biases", "norms", "embeddings"]

# Options of a loss surface: batch norms away from the original weights, arithmetic, and engine.
BatchNorm = Literal["frozen", "recalibrate", "batch", "as found"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Engine = Literal["auto", "local", "torchrun", "ray"]

# Quantities recorded for each parameter, and the flow at each boundary.
Quantity = Literal["rms", "mean_abs", "norm", "norm_before_clip", "flow"]

# State of a gradient.
GradientState = Literal["ok", "exact_zero", "underflow", "not_connected", "nonfinite"]
# A recorded run also has frozen weights and steps in which a weight is absent; a measurement also has
# activations that are not finite and boundaries that the data does not reach.
RecordedState = GradientState | Literal["frozen", "absent"]
MeasuredState = GradientState | Literal["nonfinite_activation", "not_met"]
ModelMode = Literal["train", "eval", "mixed"]

# Verdict on a gradient flow: its state, its cause, and the optimizers that it hinders. The live verdict has
# "unknown" while there is nothing to judge yet.
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
    # Function that produces NaN.
    "softmax",
    "sqrt",
    "div",
    "log",
    "norm",
]

# Reason why a step has no gradients.
MissingCause = Literal["cleared", "no backward", "detached", "replaced", "unused", "zero"]

# Connections of ``skipscope.nn``; a test compares them with its registry.
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
