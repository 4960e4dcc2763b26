"""What data and a loss are: one reading of both for every room.

A *batch* is ``(inputs, target)`` or a Mapping that goes to the model as keywords; *data* is one batch or any other
re-iterable of batches; a *loss* is ``loss(output, target)``, or nothing when the output carries ``.loss``, or
``@objective`` on ``f(model, batch)``. Several batches are averaged by the loss's own normaliser, and a check that a
batch equals its two parts runs before anything is averaged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._untouched import require_module, untouched

Batch = Any
Samples = tuple[Tensor, Tensor]  # per sample: its share of the numerator, and of the denominator, of the mean


# --- data -----------------------------------------------------------------------------------------------------------


class Batches:
    """Re-iterable batches, and whether there is only one.

    Attributes:
        single: True for one batch, which then needs no averaging.
    """

    def __init__(self, items: Iterable[Batch], *, single: bool = False):
        self.items, self.single = items, single

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self.items))


def batches(items: Sequence[Batch]) -> Batches:
    """Say that a list is a list of batches (a bare list or tuple is always one batch).

    Args:
        items: batches, each ``(inputs, target)`` or a Mapping.

    Example:
        >>> data = batches([(torch.ones(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.zeros(1))])
        >>> len(list(data))
        2
    """
    items = list(items)
    if not items:
        raise SkipscopeError("batches", "the data is empty", expected="at least one batch", got="[]")
    return Batches(items, single=len(items) == 1)


def as_batches(data: Any, operation: str, *, any_shape: bool = False) -> Batches:
    """Read ``data`` as definitions.md says, or refuse with the cure.

    Args:
        data: one batch, or a re-iterable of batches.
        operation: named in errors.
        any_shape: the loss is an ``@objective``, which may take a batch of any form.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, Tensor | Mapping):
        if isinstance(data, Tensor) and not any_shape:
            raise SkipscopeError(
                operation, "the data is a bare tensor, and nothing says what the target is",
                expected="(inputs, target), a Mapping, or a re-iterable of these",
                got=f"a tensor of shape {tuple(data.shape)}",
                cure="pass (inputs, target), or wrap the loss: @ss.objective on f(model, batch)",
            )  # fmt: skip
        return Batches([data], single=True)
    if isinstance(data, list | tuple):
        return Batches([_one_batch(data, operation, any_shape)], single=True)
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise SkipscopeError(
            operation, "the data can be read only once" if isinstance(data, Iterator) else "this is not data",
            expected="(inputs, target), a Mapping, or a re-iterable of these (a DataLoader, ss.batches([...]))",
            got=type(data).__name__, cure="ss.batches(list(data))" if isinstance(data, Iterator) else None,
        )  # fmt: skip
    for _ in data:
        return Batches(data)
    raise SkipscopeError(
        operation, "the data is empty", expected="at least one batch", got=f"an empty {type(data).__name__}"
    )


def _one_batch(data: Sequence[Any], operation: str, any_shape: bool) -> Batch:
    if not data:
        raise SkipscopeError(
            operation, "the data is empty", expected="(inputs, target)", got="an empty " + type(data).__name__
        )
    looks_like_batches = all(
        isinstance(item, Mapping) or (isinstance(item, list | tuple) and len(item) == 2) for item in data
    )
    if looks_like_batches:
        raise SkipscopeError(
            operation, "this could be one batch or a list of batches",
            expected="a list or tuple is always one batch, (inputs, target)",
            got=f"a {type(data).__name__} of {len(data)} things that look like batches",
            cure="for several batches write ss.batches([...]); for one, pass inputs as a tuple of tensors and the "
            "target as a tensor, or use @ss.objective",
        )  # fmt: skip
    if len(data) != 2 and not any_shape:
        raise SkipscopeError(
            operation, "a list or tuple is one batch, and a batch has two parts", expected="(inputs, target)",
            got=f"a {type(data).__name__} of length {len(data)}",
            cure="for several inputs pass ((x1, x2), target); for several batches ss.batches([...])",
        )  # fmt: skip
    return data


def inputs_of(batch: Batch) -> Any:
    """What the model is called with for this batch."""
    return batch[0] if isinstance(batch, list | tuple) else batch


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple (positional) or a Mapping (keywords)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, Mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nest with ``function`` applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def batch_size(batch: Batch) -> int:
    """How many samples a batch has: the first dimension of its first tensor with one."""
    for tensor in tensors_in(batch):
        if tensor.ndim:
            return tensor.shape[0]
    return 1


def rows(batch: Any, index: Tensor | slice) -> Any:
    """Some samples of a batch: what has the batch's length is indexed, everything else is kept."""
    n = batch_size(batch)

    def some(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != n:
            return tensor
        return tensor[index.to(tensor.device) if isinstance(index, Tensor) else index]

    return map_tensors(batch, some)


# --- loss -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """A loss that every room reads the same way.

    Attributes:
        name: for tables and captions.
        function: ``f(model, batch) -> scalar``.
        weight: what a batch counts for in the mean over batches.
        sums: the loss is a sum over samples, so batches add up instead of being averaged.
        from_output: ``f(output, batch) -> scalar`` where the loss is a function of the model's output, else None.
        samples: ``f(output, batch) -> (numerators, denominators)``, each ``[samples]``; their sums' ratio (their sum,
            when ``sums``) is the loss. None when per-sample losses cannot be had.
        why_no_samples: the reason, for people.
        candidates: other weights that the loss may mean; the split-batch check chooses.
    """

    name: str
    function: Callable[[nn.Module, Batch], Tensor]
    weight: Callable[[Batch], float]
    sums: bool = False
    from_output: Callable[[Any, Batch], Tensor] | None = None
    samples: Callable[[Any, Batch], Samples] | None = None
    why_no_samples: str | None = None
    candidates: tuple[Callable[[Batch], float], ...] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.function(model, batch)


def objective(
    function: Callable[[nn.Module, Batch], Tensor] | None = None,
    *,
    weight: Callable[[Batch], float] | None = None,
) -> Any:
    """Turn ``f(model, batch) -> scalar`` into a loss, for what ``loss(output, target)`` cannot say.

    Args:
        function: called with the model and one batch, whatever form the batch has.
        weight: what a batch counts for when several are averaged; default: its samples.

    Example:
        >>> @objective
        ... def reconstruction(model, batch):
        ...     return (model(batch) - batch).square().mean()
    """
    if function is None:
        return functools.partial(objective, weight=weight)
    return Objective(
        getattr(function, "__name__", "objective"), function, weight or batch_size,
        why_no_samples="an @objective returns one number a batch",
    )  # fmt: skip


def as_objective(
    loss: Any,
    operation: str,
    *,
    weight: Callable[[Batch], float] | None = None,
    sample_loss: Callable[[Any, Any], Tensor] | None = None,
) -> Objective:
    """Read a loss as definitions.md says, or refuse with the cure."""
    if isinstance(loss, Objective):
        found = loss
    elif loss is None:
        found = _loss_of_the_output(operation)
    elif callable(loss):
        found = _loss_of_output_and_target(loss, operation)
    else:
        raise SkipscopeError(
            operation, "this is not a loss", expected="loss(output, target), an nn loss module, or @ss.objective",
            got=f"{type(loss).__name__}: {loss!r:.60}", cure="torch.nn.functional.cross_entropy, for instance",
        )  # fmt: skip
    if weight is not None:
        found = replace(found, weight=weight, candidates=())
    if sample_loss is not None:
        found = replace(
            found,
            samples=lambda output, batch: _as_samples(
                sample_loss(output, target_of(batch, operation)), operation
            ),
            why_no_samples=None,
        )
    return replace(found, function=functools.partial(_checked_scalar, found.function, operation))


def target_of(batch: Batch, operation: str = "loss") -> Any:
    """The second half of a batch; for a Mapping its labels."""
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "target", "targets"):
            if key in batch:
                return batch[key]
        raise SkipscopeError(
            operation, "the batch is a Mapping without labels", expected="a key 'labels'", got=f"keys {list(batch)}",
            cure="leave the loss out if the output carries .loss, or use @ss.objective on f(model, batch)",
        )  # fmt: skip
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise SkipscopeError(
            operation, "a batch does not have two parts", expected="(inputs, target)",
            got=f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__,
            cure="yield (inputs, target) from the data, or use @ss.objective on f(model, batch)",
        )  # fmt: skip
    return batch[1]


def forward(model: nn.Module, batch: Batch, operation: str) -> Any:
    """The model's output on a batch; a shape error is told with the shapes, and names the layer when it can."""
    try:
        return call_model(model, inputs_of(batch))
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, SkipscopeError | torch.OutOfMemoryError):
            raise
        shapes = [
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(inputs_of(batch))
        ]
        raise SkipscopeError(
            operation, f"the model does not accept this input ({str(error).strip().splitlines()[0][:300]})",
            layer=_failing_layer(model, error), got=f"inputs of shape {', '.join(shapes) or 'none'}",
            cure="pass the inputs as the model's forward takes them: a tensor, a tuple, or a Mapping of keywords",
        ) from error  # fmt: skip


def _failing_layer(model: nn.Module, error: BaseException) -> str | None:
    names, found, step = {id(m): n for n, m in model.named_modules()}, None, error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        found = names.get(id(owner), found)
        step = step.tb_next
    return found or None


def read(
    model: nn.Module,
    data: Any,
    loss: Any,
    operation: str,
    *,
    weight: Callable[[Batch], float] | None = None,
    sample_loss: Callable[[Any, Any], Tensor] | None = None,
) -> tuple[Batches, Objective]:
    """What every public call does first: read data and loss, and make sure that batches may be averaged.

    Raises:
        SkipscopeError: data or loss cannot be read, the model has no numbers, or one batch does not equal its two
            parts under any known weight.
    """
    read_loss = as_objective(loss, operation, weight=weight, sample_loss=sample_loss)
    read_data = as_batches(data, operation, any_shape=isinstance(loss, Objective))
    require_module(model, operation)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SkipscopeError(
            operation, "the model is on the meta device: it has shapes, and no numbers to measure",
            cure="give it weights: model.to_empty(device=...), then load them; find_shortcuts takes it with meta inputs",
        )  # fmt: skip
    if not read_data.single and not read_loss.sums:
        read_loss = replace(read_loss, weight=_checked_weight(model, read_data, read_loss, operation))
    return read_data, read_loss


def mean_loss(model: nn.Module, data: Batches, loss: Objective) -> float:
    """The loss over all batches (as :func:`read` gave them), in float64, without gradients, in the present mode."""
    total = normaliser = 0.0
    with torch.no_grad():
        for batch in data:
            share = 1.0 if loss.sums or data.single else float(loss.weight(batch))
            if share:  # a batch with nothing to count has an undefined mean, and counts for nothing
                total += share * float(loss(model, batch).double())
                normaliser += share
    return total if loss.sums else total / normaliser if normaliser else float("nan")


def _checked_weight(
    model: nn.Module, data: Batches, loss: Objective, operation: str
) -> Callable[[Batch], float]:
    """The first weight under which every batch that was tried equals its two parts."""
    standing = [loss.weight, *loss.candidates]
    with untouched(model, training=False, seed=0, operation=operation), torch.no_grad():
        for whole in islice((b for b in islice(data, 8) if batch_size(b) > 1), 2):
            n = batch_size(whole)
            # Uneven parts too, so that a plain average of the two is caught as well.
            for cut in {max(1, n // 3), n // 2}:
                value, averages = _split(model, loss, whole, cut, standing)
                tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(value.dtype, 2e-2)
                target = float(value)
                near = [
                    abs(a - target) <= tolerance * max(abs(target), 1e-12) or target != target
                    for a in averages
                ]
                if not any(near):
                    raise SkipscopeError(
                        operation, "the loss of a batch is not the weighted mean of the losses of its two parts, so "
                        f"batches cannot be averaged (loss: {loss.name})",
                        expected=f"{target:.9g}, the loss of one batch of {n}",
                        got=f"{averages[0]:.9g} from its parts of {cut} and {n - cut}",
                        cure="say what a batch counts for: weight=lambda batch: ... (the loss's own denominator, e.g. "
                        "the number of labels that are not ignored)",
                    )  # fmt: skip
                standing = [weigh for weigh, ok in zip(standing, near) if ok]
    return standing[0]


def _split(
    model: nn.Module, loss: Objective, whole: Batch, cut: int, weights: Sequence[Callable[[Batch], float]]
) -> tuple[Tensor, list[float]]:
    """The loss of a batch, and what each weight makes of the losses of its first ``cut`` samples and the rest."""
    n = batch_size(whole)
    parts = [rows(whole, slice(0, cut)), rows(whole, slice(cut, n))]
    value, first, second = (loss(model, batch) for batch in (whole, *parts))
    averages = []
    for weigh in weights:
        a, b = (float(weigh(part)) for part in parts)
        total = (a * float(first) if a else 0.0) + (b * float(second) if b else 0.0)
        averages.append(total / (a + b) if a + b else float("nan"))
    return value, averages


# --- readings of a loss ---------------------------------------------------------------------------------------------


def _checked_scalar(function: Callable[..., Any], operation: str, model: nn.Module, batch: Batch) -> Tensor:
    value = function(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.dtype.is_floating_point:
        raise SkipscopeError(
            operation, "the loss is not a scalar", expected="a tensor with one floating-point element",
            got=f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__,
            cure='reduce it: .mean(), or reduction="mean"',
        )  # fmt: skip
    return value.reshape(())


def _loss_of_the_output(operation: str) -> Objective:
    def from_output(output: Any, batch: Batch) -> Tensor:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise SkipscopeError(
                operation, "no loss was given and the model's output carries none", expected="output.loss",
                got=f"an output of type {type(output).__name__}",
                cure="pass a loss, e.g. torch.nn.functional.cross_entropy; for Hugging Face put 'labels' in the batch",
            )  # fmt: skip
        return value

    def labels(shift: int) -> Callable[[Batch], float]:
        def count(batch: Batch) -> float:
            found = batch.get("labels") if isinstance(batch, Mapping) else None
            if not isinstance(found, Tensor):
                return batch_size(batch)
            return float((found[:, shift:] if found.ndim > 1 else found).ne(-100).sum())

        return count

    # Causal models shift the labels by one, masked ones do not; the split-batch check tells which.
    return Objective(
        "the output's own loss", lambda model, batch: from_output(forward(model, batch, operation), batch), labels(1),
        from_output=from_output, candidates=(labels(0), batch_size),
        why_no_samples="the model's own loss is one number a batch; pass sample_loss=",
    )  # fmt: skip


def _loss_of_output_and_target(loss: Callable[[Any, Any], Tensor], operation: str) -> Objective:
    def from_output(output: Any, batch: Batch) -> Tensor:
        target = target_of(batch, operation)
        try:
            return loss(output, target)
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError) as error:
            if isinstance(error, SkipscopeError):
                raise
            shapes = (
                ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in(output)) or type(output).__name__
            )
            goal = (
                ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in(target)) or type(target).__name__
            )
            raise SkipscopeError(
                operation, f"the loss does not accept this output and target ({str(error).strip().splitlines()[0][:300]})",
                got=f"output {shapes}; target {goal}", cure="wrap the loss: lambda output, target: ..., or use @ss.objective",
            ) from error  # fmt: skip

    known = _stock(loss)
    fields: dict[str, Any] = {"why_no_samples": "not a stock torch loss; pass sample_loss="}
    if known is not None:
        fields = {
            "sums": known.reduction == "sum",
            "samples": (lambda output, batch: known.samples(output, target_of(batch, operation))),
            "why_no_samples": None,
        }
    weight = (lambda batch: known.normaliser(target_of(batch, operation))) if known else batch_size
    return Objective(
        _name_of(loss), lambda model, batch: from_output(forward(model, batch, operation), batch), weight,
        from_output=from_output, **fields,
    )  # fmt: skip


def _name_of(loss: Any) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__name__", type(loss).__name__)


def _as_samples(values: Any, operation: str) -> Samples:
    if not isinstance(values, Tensor) or values.ndim == 0:
        raise SkipscopeError(
            operation, "sample_loss does not return one loss a sample", expected="a tensor of shape [samples]",
            got=f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__,
            cure='reduction="none", then .flatten(1).mean(1)',
        )  # fmt: skip
    values = values if values.ndim == 1 else values.flatten(1).mean(1)
    return values, torch.ones_like(values)


# Stock losses: the function behind each, whose denominator for reduction="mean" is known exactly.
_BY_ELEMENT = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits, F.binary_cross_entropy,
    F.soft_margin_loss,
)  # fmt: skip
_BY_CLASS = (F.cross_entropy, F.nll_loss)
_MODULES = {
    nn.MSELoss: F.mse_loss, nn.L1Loss: F.l1_loss, nn.SmoothL1Loss: F.smooth_l1_loss, nn.HuberLoss: F.huber_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits, nn.BCELoss: F.binary_cross_entropy,
    nn.SoftMarginLoss: F.soft_margin_loss, nn.CrossEntropyLoss: F.cross_entropy, nn.NLLLoss: F.nll_loss,
}  # fmt: skip


@dataclass(frozen=True)
class _Stock:
    function: Callable[..., Tensor]
    options: dict[str, Any]
    reduction: str

    def _class_weights(self, target: Tensor) -> Tensor:
        """The denominator's share of each target element (class indices, or probabilities in dimension 1)."""
        if target.is_floating_point():
            return torch.ones_like(target.select(1 if target.ndim > 1 else 0, 0))
        counted = target.ne(self.options.get("ignore_index", -100))
        weight = self.options.get("weight")
        if weight is None:
            return counted.to(torch.float64)
        return weight.to(target.device)[target.where(counted, torch.zeros_like(target))] * counted

    def normaliser(self, target: Any) -> float:
        if not isinstance(target, Tensor):
            return batch_size(target)
        return (
            float(self._class_weights(target).sum()) if self.function in _BY_CLASS else float(target.numel())
        )

    def samples(self, output: Tensor, target: Tensor) -> Samples:
        losses = self.function(output, target, **self.options, reduction="none")
        by_class = self.function in _BY_CLASS
        shares = self._class_weights(target).to(losses.dtype) if by_class else torch.ones_like(losses)
        return _per_sample(losses), _per_sample(shares)


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.ndim > 1 else values.reshape(-1)


def _stock(loss: Any) -> _Stock | None:
    if type(loss) in _MODULES:
        function = _MODULES[type(loss)]
        options = {k: getattr(loss, k) for k in inspect.signature(function).parameters if hasattr(loss, k)}
    else:
        options, function = {}, loss
        while isinstance(function, functools.partial) and not function.args:
            options, function = {**function.keywords, **options}, function.func
        if function not in (*_BY_ELEMENT, *_BY_CLASS):
            return None
    reduction = options.pop("reduction", "mean")
    if reduction not in {"mean", "sum"} or {"reduce", "size_average"} & {
        k for k, v in options.items() if v is not None
    }:
        return None
    return _Stock(
        function, {k: v for k, v in options.items() if k not in {"reduce", "size_average"}}, reduction
    )
