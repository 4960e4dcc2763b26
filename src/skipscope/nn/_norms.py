"""Positions of the norm N in a residual block.

post-norm       y = N(x + F(x))         Vaswani et al. 2017, arXiv 1706.03762
pre-norm        y = x + F(N(x))         Xiong et al. 2020, arXiv 2002.04745
sandwich norm   y = x + N(F(N(x)))      Ding et al. 2021, arXiv 2105.13290
                                        Kim et al. 2025 (peri-norm), arXiv 2502.02732
DeepNorm        y = N(a x + F(x))       Wang et al. 2022, arXiv 2203.00555
                F's weights times b at the start:
                L layers alone                a = (2L)^(1/4)            b = (8L)^(-1/4)
                encoder, N, with M decoding   a = 0.81 (N^4 M)^(1/16)   b = 0.87 (N^4 M)^(-1/16)
                decoder, M, with an encoder   a = (3M)^(1/4)            b = (12M)^(-1/4)
sub-LN          y = x + W N(G(N(x)))    Wang et al. 2022 (Magneto), arXiv 2210.06423
                F = W G, W its last linear map; F's weights, but those of q and k, times sqrt(log 2L) at the
                start, L layers
Keel            y = N(L x + F(N(x)))    Chen and Wei 2026, arXiv 2601.19895; L branches in the network
Admin           y = N(w x + F(x))       Liu et al. 2020, arXiv 2004.08249
                w is learned, per feature; at the start the root of the summed variances of the network's
                input and the outputs of all earlier branches
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope.nn._connection import Connection, Elsewhere, WidthNorm, along
from skipscope.nn._scaled import scaled_shortcut


class _Normed(Connection):
    def __init__(self, branch: nn.Module, width: int, *, dim: int = -1, norm: nn.Module | None = None):
        super().__init__(branch)
        self.norm = norm or WidthNorm(width, dim=dim)


class PreNorm(_Normed):
    """``x + F(N(x))``.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        dim: the dimension that holds the features.
        norm: module to use instead of layer normalisation.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> PreNorm(nn.Identity(), 2)(x).detach().round()  # (1, 3) + (-1, 1)
        tensor([[0., 4.]])
    """

    def read(self, x: Tensor) -> Tensor:
        """``N(x)``."""
        return self.norm(x)


class PostNorm(_Normed):
    """``N(x + F(x))``; arguments as for :class:`PreNorm`.

    Example:
        >>> PostNorm(nn.Identity(), 2)(torch.tensor([[1.0, 3.0]])).detach()
        tensor([[-1.0000,  1.0000]])
    """

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(x + f)``."""
        return self.norm(x + f)


class Admin(PostNorm):
    """``N(diag(w) x + F(x))``.

    Arguments as for :class:`PreNorm`, and ``omega``, the initial value of every element of w. :func:`admin_`
    sets it as the paper does, from one run of the network.

    Example:
        >>> Admin(nn.Linear(4, 4), 4, omega=3**0.5).omega.shape
        torch.Size([4])
    """

    kind = "scaled"

    def __init__(
        self,
        branch: nn.Module,
        width: int,
        *,
        dim: int = -1,
        norm: nn.Module | None = None,
        omega: float = 1.0,
    ):
        super().__init__(branch, width, dim=dim, norm=norm)
        self.omega, self.dim = nn.Parameter(torch.full((width,), omega)), dim

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(diag(w) x + f)``."""
        return self.norm(along(self.omega, x, self.dim) * x + f)


class SandwichNorm(PreNorm):
    """``x + N'(F(N(x)))``: a second norm after the branch.

    Arguments as for :class:`PreNorm`, and ``norm_out``, the module to use as the second norm.

    Example:
        >>> block = SandwichNorm(nn.Linear(4, 4), 4)
        >>> x = torch.randn(3, 4)
        >>> (block(x) - x).mean(-1).abs().max() < 1e-5  # what is added is normed
        tensor(True)
    """

    def __init__(
        self,
        branch: nn.Module,
        width: int,
        *,
        dim: int = -1,
        norm: nn.Module | None = None,
        norm_out: nn.Module | None = None,
    ):
        super().__init__(branch, width, dim=dim, norm=norm)
        self.norm_out = norm_out or WidthNorm(width, dim=dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``x + N'(f)``."""
        return x + self.norm_out(f)


class Keel(PreNorm):
    """``N(depth x + F(N(x)))``: post-norm whose shortcut is scaled by the network's depth.

    Args:
        branch: F.
        width: size of dimension ``dim``.
        depth: number of such branches in the network.
        dim: the dimension that holds the features.

    Example:
        >>> block = Keel(nn.Linear(4, 4), 4, depth=24)
        >>> block.scale, block(torch.randn(3, 4)).shape
        (24.0, torch.Size([3, 4]))
    """

    kind = "scaled"

    def __init__(self, branch: nn.Module, width: int, depth: int, *, dim: int = -1):
        super().__init__(branch, width, dim=dim)
        self.scale, self.norm_out = float(depth), WidthNorm(width, dim=dim)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(depth x + f)``."""
        return self.norm_out(scaled_shortcut(x, f, self.scale))


class SubNorm(PreNorm):
    """``x + W N'(G(N(x)))``: a second norm inside the branch, before its last linear map W.

    Args:
        branch: F; its last linear layer or convolution is W, and gets the norm as a forward pre-hook.
        width: size of dimension ``dim``.
        layers: number of layers in the network, of two branches each. It determines the factor on the weights
            of F, except those of queries and keys.
        dim: the dimension that holds the features.

    Raises:
        SkipscopeError: the branch has no linear map that it calls as a module.

    Example:
        >>> branch = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> SubNorm(branch, 4, layers=6).norm_in.normalized_shape
        (8,)
    """

    def __init__(self, branch: nn.Module, width: int, layers: int, *, dim: int = -1):
        super().__init__(branch, width, dim=dim)
        self.layers = layers
        if not isinstance(branch, Elsewhere):
            self.initialise_(branch)

    def initialise_(self, branch: nn.Module) -> None:
        """Insert the norm before the last linear map, and initialise the weights as in the paper."""
        maps = [m for m in branch.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        # torch's attention uses the weight of its last layer without calling the layer, so hooks do not run.
        if not maps or any(isinstance(m, nn.MultiheadAttention) for m in branch.modules()):
            raise SkipscopeError(
                "SubNorm",
                "the branch calls no linear map before which the second norm could stand",
                expected="a linear layer or a convolution",
                got=type(branch).__name__,
                cure="put the linear layer last",
            )
        last = maps[-1]
        is_linear = isinstance(last, nn.Linear)
        self.norm_in = WidthNorm(
            last.in_features if is_linear else last.in_channels, dim=-1 if is_linear else 1
        )
        self.norm_in.to(last.weight.device, last.weight.dtype)
        last.register_forward_pre_hook(_Before(self.norm_in))
        _scale_values(branch, sub_norm_gain(self.layers), QUERIES_AND_KEYS)


class _Before:
    """A forward pre-hook that applies a module to the first input."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.module(args[0]), *args[1:])


def sub_norm_gain(layers: int) -> float:
    """Sub-LN's factor on the branch's weights at the start, ``sqrt(log(2 layers))``.

    Example:
        >>> sub_norm_gain(6) == math.log(12) ** 0.5
        True
    """
    return math.sqrt(math.log(2 * layers))


class DeepNorm(_Normed):
    """``N(a x + F(x))``, with a from :func:`deep_norm_constants`.

    Args:
        branch: F; :func:`deep_norm_` or ``initialise_`` scales its weights.
        width: size of dimension ``dim``.
        layers: number of layers of this encoder or decoder, of two branches each.
        encoder_layers: for a decoder with an encoder, the encoder's number of layers.
        decoder_layers: for an encoder with a decoder, the decoder's number of layers.
        dim: the dimension that holds the features.
        norm: module to use instead of layer normalisation.

    Example:
        >>> block = DeepNorm(nn.Linear(4, 4), 4, layers=8)
        >>> block.scale, block(torch.randn(3, 4)).shape  # a = (2 * 8)^(1/4)
        (2.0, torch.Size([3, 4]))
    """

    kind = "scaled"

    def __init__(
        self,
        branch: nn.Module,
        width: int,
        layers: int,
        *,
        encoder_layers: int | None = None,
        decoder_layers: int | None = None,
        dim: int = -1,
        norm: nn.Module | None = None,
    ):
        super().__init__(branch, width, dim=dim, norm=norm)
        self.scale, self.branch_scale = deep_norm_constants(
            layers, encoder_layers=encoder_layers, decoder_layers=decoder_layers
        )

    def initialise_(self, branch: nn.Module) -> None:
        """Scale a branch's weights as :func:`deep_norm_` does."""
        _scale_values(branch, self.branch_scale, QUERIES_AND_KEYS)

    def write(self, x: Tensor, f: Tensor) -> Tensor:
        """``N(a x + f)``."""
        return self.norm(scaled_shortcut(x, f, self.scale))


def deep_norm_constants(
    layers: int, *, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> tuple[float, float]:
    """DeepNorm's factor on the shortcut, and its factor on the branch's initial weights.

    Args:
        layers: number of layers of this encoder or decoder.
        encoder_layers: for a decoder with an encoder, the encoder's number of layers.
        decoder_layers: for an encoder with a decoder, the decoder's number of layers.

    Example:
        >>> deep_norm_constants(8)
        (2.0, 0.3535533905932738)
    """
    if decoder_layers is not None:
        product = layers**4 * decoder_layers
        return 0.81 * product ** (1 / 16), 0.87 * product ** (-1 / 16)
    if encoder_layers is not None:
        return (3 * layers) ** 0.25, (12 * layers) ** -0.25
    return (2 * layers) ** 0.25, (8 * layers) ** -0.25


# Names of query and key weights in common libraries; DeepNorm does not scale them.
QUERIES_AND_KEYS = (
    "q_proj",
    "k_proj",
    "q_proj_weight",
    "k_proj_weight",
    "to_q",
    "to_k",
    "query",
    "key",
    "wq",
    "wk",
)
# Weights that hold queries, keys and values: as thirds of the rows, as thirds of the columns, or in another
# order.
_FUSED_ROWS = ("in_proj_weight", "qkv", "Wqkv", "in_proj", "to_qkv")
_FUSED_COLUMNS = ("c_attn",)
_FUSED_OTHERWISE = ("query_key_value", "qkv_proj", "W_pack", "kv_proj", "to_kv")


@torch.no_grad()
def deep_norm_(
    branch: nn.Module,
    layers: int,
    skip: tuple[str, ...] = QUERIES_AND_KEYS,
    *,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
) -> nn.Module:
    """Scale a branch's weights in place as DeepNorm does, except those of queries and keys.

    Of a weight that holds queries, keys and values, the last third is scaled.

    Args:
        branch: F, already initialised (Xavier in the paper).
        layers: number of layers of the encoder or decoder.
        skip: names of weights, or of their modules, that are not scaled.
        encoder_layers: see :func:`deep_norm_constants`.
        decoder_layers: see :func:`deep_norm_constants`.

    Raises:
        SkipscopeError: a weight fuses queries, keys and values in an unknown order.

    Example:
        >>> branch = nn.Linear(2, 2)
        >>> _ = nn.init.ones_(branch.weight)
        >>> deep_norm_(branch, layers=2).weight.tolist()  # times (8 * 2)^(-1/4)
        [[0.5, 0.5], [0.5, 0.5]]
    """
    _, factor = deep_norm_constants(layers, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    _scale_values(branch, factor, skip)
    return branch


@torch.no_grad()
def _scale_values(branch: nn.Module, factor: float, skip: tuple[str, ...]) -> None:
    scaled = []
    for name, parameter in branch.named_parameters():
        words = set(name.split(".")[-2:])
        if parameter.ndim < 2 or words & set(skip):
            continue
        dim = 0 if words & set(_FUSED_ROWS) else 1 if words & set(_FUSED_COLUMNS) else None
        if words & set(_FUSED_OTHERWISE) or (dim is not None and parameter.shape[dim] % 3):
            raise SkipscopeError(
                "deep_norm_",
                "a weight fuses queries, keys and values in an order that is not known",
                layer=name,
                expected="thirds: queries, keys, values",
                got=f"shape {tuple(parameter.shape)}",
                cure="scale it by hand, and leave it out: skip=(...)",
            )
        scaled.append(parameter if dim is None else parameter.chunk(3, dim)[2])
    # Scale only after the loop, so that a refusal leaves every weight unchanged.
    for weight in scaled:
        weight.mul_(factor)


@torch.no_grad()
def admin_(model: nn.Module, *inputs: Any, **keywords: Any) -> nn.Module:
    """Initialise every :class:`Admin` of a model in place from one forward pass over data, as the paper does.

    With every w at 1, the pass measures the variance of each branch's output. Then the w of branch i is the
    square root of a sum: the variance of the first branch's input, and the variances of the outputs of the
    branches before i.

    Args:
        model: a model that calls its :class:`Admin` modules in sequence.
        inputs: its positional arguments.
        keywords: its keyword arguments.

    Example:
        >>> blocks = nn.Sequential(*[Admin(nn.Linear(4, 4), 4) for _ in range(3)])
        >>> _ = admin_(blocks, torch.randn(100, 4))
        >>> blocks[2].omega.min() > blocks[1].omega.max() > blocks[0].omega.min()
        tensor(True)
    """
    profiled: list[tuple[Admin, float, float]] = []
    blocks = [module for module in model.modules() if isinstance(module, Admin)]
    handles = []
    for block in blocks:
        block.omega.fill_(1.0)

        def note(_: nn.Module, args: Any, output: Tensor, block: Admin = block) -> None:
            profiled.append((block, float(args[0].float().var()), float(output.float().var())))

        handles.append(block.branch.register_forward_hook(note))
    try:
        model(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    total = profiled[0][1] if profiled else 0.0
    for block, _, variance in profiled:
        block.omega.fill_(total**0.5)
        total += variance
    return model
