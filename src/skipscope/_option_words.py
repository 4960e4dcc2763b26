"""The words that options take, for type checkers, for the command line and for the checks of each call.

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
