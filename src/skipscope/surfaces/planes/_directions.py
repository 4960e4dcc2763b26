"""Directions in weight space: Gaussian, normalised filter by filter to the weights, defined by their seed.

Notation: w_f is filter f of the weights, d_f the same filter of a direction. A *direction* maps a model's
parameter names to tensors; a missing name has zero direction.

Filter normalisation (arXiv 1712.09913, section 4): d_f <- d_f |w_f| / |d_f|. A filter is an output channel:

- a linear layer's row; a convolution's output channel; an embedding's row (one token's vector);
- a transposed convolution's output channel, which is dimension 1 (within its group);
- a column of Hugging Face's ``Conv1D``, which computes x W;
- for any other parameter of two or more dimensions, a slice of dimension 0.

Parameters of one dimension or none (biases, batch-norm gains, scalars) and everything in a normalisation
layer have zero direction by default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._option_words import Normalization, Zeroable
from skipscope._public_call import public_call
from skipscope._ranks import meet, ranks_of, spread_like, whole
from skipscope._sharding import class_name, refuse_unmovable
from skipscope._validation import names_matching, require_option

Direction = Mapping[str, Tensor]
NORMALIZATIONS = get_args(Normalization)
ZEROABLE = get_args(Zeroable)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@public_call("random_direction")
def random_direction(
    model: nn.Module,
    *,
    seed: int = 0,
    axis: int = 0,
    normalize: Normalization = "filter",
    zero: Zeroable | Iterable[Zeroable] = ("biases", "norms"),
    parameters: str | Iterable[str] | None = None,
    like: Direction | None = None,
    keep: bool = True,
) -> Direction:
    """A Gaussian direction, normalised to the model's weights.

    The draw of a parameter depends only on the seed, the axis, its name and its shape, so that twins get the
    same draw for common parameters, on any device and in any precision. The global random state is unchanged.
    Local; collective under FSDP2, where each rank keeps its shard of the same direction.

    Args:
        model: model whose weights give names, shapes and norms.
        seed: seed of the private generator.
        axis: 0 or 1 (or more): independent directions of one seed.
        normalize: "filter"; "layer" (all of a module's moved parameters together); "tensor"; "none".
        zero: kinds of parameters without a direction: any of "biases", "norms", "embeddings".
        parameters: names or patterns (``"layer1.*"``) of parameters with a direction; default: all.
        like: make the direction orthogonal to this one, filter by filter, before it is normalised.
        keep: hold the tensors; False draws a tensor again at each access, for models that fill the memory.

    Returns:
        Name -> tensor of the parameter's shape, dtype and device, for each parameter that moves.

    Raises:
        SkipscopeError: the normalisation is unknown, or no parameter is left to move.

    Example:
        >>> direction = random_direction(nn.Linear(3, 2), seed=1)
        >>> list(direction), direction["weight"].shape
        (['weight'], torch.Size([2, 3]))
    """
    refuse_unmovable(model, "landscape")
    meet("random_direction", ranks_of(model))
    require_option("landscape", "normalisation", normalize, NORMALIZATIONS)
    seeded = SeededDirection(moved_parameters(model, zero, parameters), seed, axis, normalize, like)
    return dict(seeded) if keep else seeded


class SeededDirection(Mapping[str, Tensor]):
    """Direction without stored tensors: a tensor is drawn and normalised again at each access.

    For models whose directions do not fit into memory beside them.

    Args:
        moved: parameters that move, with their filter dimension.
        seed: seed of the draw.
        axis: axis of the draw.
        normalize: as in :func:`random_direction`.
        like: as in :func:`random_direction`.
    """

    def __init__(
        self,
        moved: Mapping[str, tuple[Tensor, int]],
        seed: int,
        axis: int,
        normalize: Normalization,
        like: Mapping[str, Tensor] | None,
    ):
        self.moved, self.seed, self.axis, self.normalize, self.like = moved, seed, axis, normalize, like

    def __iter__(self) -> Iterator[str]:
        return iter(self.moved)

    def __len__(self) -> int:
        return len(self.moved)

    def __getitem__(self, name: str) -> Tensor:
        weight, dimension = self.moved[name]
        draw = self._draw(name)
        if self.normalize == "filter":
            draw *= _ratio(filter_norms(whole(weight), dimension), filter_norms(draw, dimension))
        elif self.normalize != "none":
            layer = name.rpartition(".")[0]
            group = (
                [n for n in self.moved if n.rpartition(".")[0] == layer]
                if self.normalize == "layer"
                else [name]
            )
            wanted = torch.stack([doubled(whole(self.moved[n][0])).norm() for n in group]).norm()
            draw *= _ratio(wanted, torch.stack([self._draw(n).norm() for n in group]).norm())
        return spread_like(draw.to(weight.dtype), weight)

    def _draw(self, name: str) -> Tensor:
        weight, dimension = self.moved[name]
        draw = _gaussian(f"{self.seed}/{self.axis}/{name}/{tuple(weight.shape)}", weight)
        if self.like is not None and name in self.like:
            by_filter = dimension if self.normalize == "filter" else None
            draw = _project_out(draw, doubled(whole(self.like[name])), by_filter)
        return draw


def moved_parameters(
    model: nn.Module, zero: Zeroable | Iterable[Zeroable], parameters: str | Iterable[str] | None = None
) -> dict[str, tuple[Tensor, int]]:
    """Parameters that have a direction, with the dimension that indexes their filters."""
    zero = set((zero,) if isinstance(zero, str) else zero)
    for kind in zero:
        require_option("landscape", "kind of parameter to leave still", kind, ZEROABLE)
    owners: dict[str, nn.Module] = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            owners[f"{module_name}.{name}" if module_name else name] = module
    moved = {}
    named = dict(model.named_parameters())
    chosen = named.keys() if parameters is None else names_matching(list(named), parameters, "landscape")
    for name, weight in named.items():
        if name not in chosen:
            continue
        owner = owners[name]
        is_norm = isinstance(owner, _NORMS) or "Norm" in class_name(owner)
        if (
            not (weight.is_floating_point() or weight.is_complex())
            or (is_norm and "norms" in zero)
            or (weight.ndim < 2 and not is_norm and "biases" in zero)
            or (isinstance(owner, nn.Embedding | nn.EmbeddingBag) and "embeddings" in zero)
        ):
            continue
        moved[name] = weight.detach(), _filter_dimension(owner, weight)
    if not moved:
        raise SkipscopeError(
            "landscape",
            "no parameter is left to move",
            expected="a model with weights of two dimensions or more",
            got=f"{len(chosen)} parameters, all left still",
            cure="zero=() moves everything",
        )
    return moved


def _filter_dimension(owner: nn.Module, weight: Tensor) -> int:
    if weight.ndim < 2:
        # A vector is a single filter.
        return -1
    swapped = isinstance(owner, _TRANSPOSED) or class_name(owner) == "Conv1D"
    return 1 if swapped else 0


def _gaussian(key: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    )
    # Always drawn in float32 on the CPU, for the same values in every precision and on every device.
    if like.is_complex():
        draw = torch.view_as_complex(torch.randn((*like.shape, 2), generator=generator))
        return draw.to(like.device, torch.complex128)
    return torch.randn(like.shape, generator=generator).to(like.device, torch.float64)


def doubled(tensor: Tensor) -> Tensor:
    """Convert to float64, or to complex128 if ``tensor`` is complex."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as real, ``[*shape, 2]``, and return a real tensor unchanged.

    A complex weight is two coordinates of weight space.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def filter_norms(tensor: Tensor, dimension: int) -> Tensor:
    """Norm of each filter, in float64, shaped to broadcast against ``tensor``."""
    tensor = doubled(tensor)
    if dimension < 0 or tensor.ndim < 2:
        return tensor.norm().reshape([1] * tensor.ndim)
    others = [i for i in range(tensor.ndim) if i != dimension]
    return torch.linalg.vector_norm(tensor, dim=others, keepdim=True)


def _project_out(draw: Tensor, other: Tensor, dimension: int | None) -> Tensor:
    """Project ``other`` out of ``draw``, filter by filter (or as a whole tensor)."""
    size, inner = other.abs().square(), (draw * other.conj()).real
    if dimension is None or dimension < 0:
        square, along = size.sum(), inner.sum()
    else:
        others = [i for i in range(draw.ndim) if i != dimension]
        square, along = size.sum(others, keepdim=True), inner.sum(others, keepdim=True)
    rest = draw - other * torch.where(square > 0, along / square.clamp(min=1e-300), 0.0)
    # A filter with a single element has no orthogonal direction; it stays as drawn.
    single = draw.numel() == 1 or (dimension is not None and draw.numel() == draw.shape[dimension])
    return draw if single else rest


def _ratio(wanted: Tensor, has: Tensor) -> Tensor:
    # A filter of zeros (zero-initialised layers) gives no scale: its direction is zero, never 0/0.
    return torch.where(has > 0, wanted / has.clamp(min=1e-300), 0.0)


def checked_direction(direction: Any, model: nn.Module) -> Direction:
    """Read the user's own direction, and refuse it if it does not fit the model."""
    parameters = dict(model.named_parameters())
    if not isinstance(direction, Mapping) or not direction:
        raise SkipscopeError(
            "landscape",
            "this is not a direction",
            expected="a dict from parameter names to tensors",
            got=type(direction).__name__,
            cure="dict(zip((n for n, _ in model.named_parameters()), tensors))",
        )
    read = {}
    for name, tensor in direction.items():
        if name not in parameters:
            raise SkipscopeError(
                "landscape",
                "a direction names a parameter that the model does not have",
                layer=str(name),
                expected=f"one of {', '.join(list(parameters)[:6])}, ...",
            )
        try:
            tensor = torch.as_tensor(tensor)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SkipscopeError(
                "landscape",
                "a direction holds something that is no tensor",
                layer=name,
                expected=tuple(parameters[name].shape),
                got=f"{type(tensor).__name__}: {tensor!r:.80}",
            ) from error
        if tensor.shape != parameters[name].shape:
            raise SkipscopeError(
                "landscape",
                "a direction does not have its parameter's shape",
                layer=name,
                expected=tuple(parameters[name].shape),
                got=tuple(tensor.shape),
            )
        if tensor.is_complex() and not parameters[name].is_complex():
            raise SkipscopeError(
                "landscape",
                "a direction is complex and its parameter is real",
                layer=name,
                expected=str(parameters[name].dtype),
                got=str(tensor.dtype),
                cure="its .real part",
            )
        tensor = whole(tensor.detach()).to(parameters[name].device, parameters[name].dtype)
        read[name] = spread_like(tensor, parameters[name])
    return read


# --- what is measured on directions ---


def inner(a: Direction, b: Direction) -> float:
    """Inner product of two directions over all parameters, in float64; complex numbers as two reals."""
    return sum(_inner(whole(a[n]), whole(b[n])) for n in a if n in b)


def _inner(a: Tensor, b: Tensor) -> float:
    return float((as_real(a).double() * as_real(b).double()).sum())


def cosine(a: Direction, b: Direction) -> float:
    """Cosine between two directions; NaN if either is zero."""
    size = (inner(a, a) * inner(b, b)) ** 0.5
    return inner(a, b) / size if size else float("nan")


def worst_filter_ratio(direction: Direction, moved: Mapping[str, tuple[Tensor, int]]) -> float:
    """|d_f| / |w_f| of the filter where it is furthest from 1, ignoring filters of zeros."""
    worst = 1.0
    for name, tensor in direction.items():
        if name not in moved:
            continue
        weight, dimension = moved[name]
        wanted, has = (filter_norms(whole(t), dimension).flatten() for t in (weight, tensor))
        ratios = (has / wanted)[wanted > 0]
        if len(ratios):
            candidate = float(ratios[(ratios - 1).abs().argmax()])
            worst = candidate if abs(candidate - 1) > abs(worst - 1) else worst
    return worst
