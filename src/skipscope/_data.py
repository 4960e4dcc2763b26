"""Losses and their average over batches; :func:`read` checks the data and the loss of every public call.

A *loss* is ``loss(output, target)``, or None if the output has ``.loss``, or ``@objective`` on
``f(model, batch)``. Several batches are averaged with the loss's own normaliser. Before averaging, a check
verifies that the loss of a batch equals the weighted mean over its two parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from skipscope._batches import Arguments as Arguments
from skipscope._batches import Batch as Batch
from skipscope._batches import Batches as Batches
from skipscope._batches import as_batches as as_batches
from skipscope._batches import batch_size as batch_size
from skipscope._batches import batches as batches
from skipscope._batches import inputs_of as inputs_of
from skipscope._batches import map_tensors as map_tensors
from skipscope._batches import rows as rows
from skipscope._batches import sample_count as sample_count
from skipscope._batches import target_of as target_of
from skipscope._batches import tensors_in as tensors_in
from skipscope._errors import SkipscopeError
from skipscope._model_calls import call_loss, error_text
from skipscope._model_calls import call_model as call_model
from skipscope._model_calls import forward as forward
from skipscope._model_calls import without_gradients as without_gradients
from skipscope._sharding import computed_in
from skipscope._torch_losses import Samples as Samples
from skipscope._torch_losses import stock_loss
from skipscope._untouched import require_numbers, untouched

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Objective:
    """A loss, and its average over batches.

    Attributes:
        name: name in tables and captions.
        function: ``f(model, batch) -> scalar``.
        weight: batch -> its weight in the mean over batches.
        weight_from: source of the weight: the user, torch's loss (its normaliser), or by default the number
            of samples.
        sums: whether the loss is a sum over samples, so that batches are added instead of averaged.
        from_output: ``f(output, batch) -> scalar`` if the loss is a function of the model's output, otherwise
            None.
        samples: ``f(output, batch) -> (numerators, denominators)``, each ``[samples]``; the ratio of their
            sums (the sum of numerators if ``sums``) is the loss. None if per-sample losses are not available.
        why_no_samples: the reason, as text.
        is_its_samples: whether ``samples`` are the terms of the loss itself, so that the loss need not be
            computed separately.
        candidates: alternative weights; the split-batch check chooses among them.
    """

    name: str
    function: Callable[[nn.Module, Batch], Tensor]
    weight: Callable[[Batch], float]
    weight_from: Literal["user", "loss", "samples"] = "samples"
    sums: bool = False
    from_output: Callable[[Any, Batch], Tensor] | None = None
    samples: Callable[[Any, Batch], Samples] | None = None
    why_no_samples: str | None = None
    is_its_samples: bool = False
    candidates: tuple[Callable[[Batch], float], ...] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.function(model, batch)

    def run(self, model: nn.Module, batch: Batch) -> None:
        """Run the model on a batch; the loss is computed only if it is not a function of the output."""
        if self.from_output is not None:
            forward(model, batch, "loss")
        else:
            self.function(model, batch)


@overload
def objective(function: _Function, *, weight: Callable[[Any], float] | None = None) -> _Function: ...
@overload
def objective(
    function: None = None, *, weight: Callable[[Any], float] | None = None
) -> Callable[[_Function], _Function]: ...
def objective(function: Any = None, *, weight: Callable[[Any], float] | None = None) -> Any:
    """Turn ``f(model, batch) -> scalar`` into a loss, if ``loss(output, target)`` cannot express it.

    Local.

    Args:
        function: called with the model and a batch of any form.
        weight: batch -> its weight in the mean over batches; default: its number of samples.

    Example:
        >>> @objective
        ... def reconstruction(model, batch):
        ...     return (model(batch) - batch).square().mean()
    """
    if function is None:
        return functools.partial(objective, weight=weight)
    return Objective(
        getattr(function, "__name__", "objective"),
        function,
        weight or batch_size,
        "user" if weight else "samples",
        why_no_samples="an @objective returns one number a batch",
    )


def as_objective(
    loss: Any,
    operation: str,
    *,
    weight: Callable[[Batch], float] | None = None,
    sample_loss: Callable[[Any, Any], Tensor] | None = None,
) -> Objective:
    """Convert a loss to an Objective, or raise an error with a cure."""
    if isinstance(loss, Objective):
        found = loss
    elif loss is None:
        found = _loss_of_the_output(operation)
    elif isinstance(loss, type) and issubclass(loss, nn.Module):
        raise SkipscopeError(
            operation,
            "the loss is a class, and not yet a loss",
            expected="loss(output, target)",
            got=loss.__name__,
            cure=f"make one: {loss.__name__}()",
        )
    elif callable(loss):
        found = _loss_of_output_and_target(loss, operation)
    else:
        raise SkipscopeError(
            operation,
            "this is not a loss",
            expected="loss(output, target), an nn loss module, or @ss.objective",
            got=f"{type(loss).__name__}: {loss!r:.60}",
            cure="torch.nn.functional.cross_entropy, for instance",
        )
    if weight is not None:
        found = replace(found, weight=weight, weight_from="user", candidates=())
    if sample_loss is not None:
        found = replace(
            found,
            samples=lambda output, batch: _as_samples(
                sample_loss(output, target_of(batch, operation)), operation
            ),
            why_no_samples=None,
            is_its_samples=False,
        )
    checked = functools.partial(_checked_scalar, found.function, operation)
    from_output = found.from_output and functools.partial(_checked_scalar, found.from_output, operation)
    return replace(found, function=checked, from_output=from_output)


def read(
    model: nn.Module,
    data: Any,
    loss: Any,
    operation: str,
    *,
    weight: Callable[[Batch], float] | None = None,
    sample_loss: Callable[[Any, Any], Tensor] | None = None,
) -> tuple[Batches, Objective]:
    """Read the data and the loss of a public call, and check that batches may be averaged.

    Raises:
        SkipscopeError: data or loss cannot be read, the model is on the meta device, or the weight of a batch
            is not known: its size cannot be inferred, or its loss is not the mean over its two parts under
            any known weight.
    """
    require_numbers(model, operation)
    read_loss = as_objective(loss, operation, weight=weight, sample_loss=sample_loss)
    read_data = as_batches(data, operation, any_shape=isinstance(loss, Objective))
    if read_data.single and tensors_in(read_data.first()) and not batch_size(read_data.first()):
        raise SkipscopeError(
            operation,
            "the batch is empty: it has no samples",
            expected="at least one",
            got="a first dimension of 0",
            cure="check the DataLoader",
        )
    if not read_data.single and not read_loss.sums and read_loss.weight_from != "user":
        read_loss = replace(read_loss, weight=_checked_weight(model, read_data, read_loss, operation))
    return read_data, read_loss


def mean_loss(model: nn.Module, data: Batches, loss: Objective) -> float:
    """Mean loss over batches from :func:`read`, accumulated in float64, in the model's current mode."""

    def run() -> tuple[float, float]:
        total = normaliser = 0.0
        for batch in data:
            share = 1.0 if loss.sums or data.single else float(loss.weight(batch))
            # A batch of weight zero has an undefined mean.
            if share:
                total += share * float(loss(model, batch).detach().double())
                normaliser += share
        return total, normaliser

    total, normaliser = without_gradients(run)
    return total if loss.sums else total / normaliser if normaliser else float("nan")


def _checked_weight(
    model: nn.Module, data: Batches, loss: Objective, operation: str
) -> Callable[[Batch], float]:
    """The first weight under which the loss of every tested batch is the mean over its two parts."""
    with untouched(model, training=False, seed=0, operation=operation):
        return without_gradients(lambda: _first_fitting_weight(model, data, loss, operation))


# Relative tolerance between the loss of a batch and the mean over its parts.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def _first_fitting_weight(
    model: nn.Module, data: Batches, loss: Objective, operation: str
) -> Callable[[Batch], float]:
    looked_at = data.peek(8)
    for batch in looked_at:
        _refuse_unseen_count(loss, batch, operation)
    standing = [loss.weight, *loss.candidates]
    for whole in [batch for batch in looked_at if batch_size(batch) > 1][:2]:
        n = batch_size(whole)
        # Uneven parts expose losses for which only the plain average over equal parts is right.
        for cut in {max(1, n // 3), n // 2}:
            value = loss(model, whole).detach()
            try:
                averages = _averages(model, loss, whole, cut, standing)
            except Exception as error:
                if _normaliser_is_known(loss, whole):
                    return standing[0]
                raise SkipscopeError(
                    operation,
                    f"a batch cannot be cut in two ({error_text(error)}): nothing shows what it counts for",
                    got=_form_of(whole),
                    cure=_SAY_THE_WEIGHT,
                ) from error
            tolerance = max(_ROUNDING.get(d, 2e-2) for d in {value.dtype, *computed_in(model)})
            target = float(value)
            near = [_is_near(average, target, tolerance) or target != target for average in averages]
            if not any(near):
                # A noisy loss differs between two runs on the same batch, so the check cannot decide.
                if not _is_near(float(loss(model, whole).detach()), target, tolerance):
                    return standing[0]
                raise _not_a_mean(loss, operation, target, averages[0], cut, n)
            standing = [weigh for weigh, ok in zip(standing, near) if ok]
    return standing[0]


_SAY_THE_WEIGHT = (
    "say what a batch counts for: weight=lambda batch: ... (its number of samples, where the loss is a mean"
    " over samples)"
)


def _refuse_unseen_count(loss: Objective, batch: Batch, operation: str) -> None:
    if sample_count(batch) is None and not _normaliser_is_known(loss, batch):
        raise SkipscopeError(
            operation,
            "no number of samples can be seen in a batch, and there are several to average",
            expected="tensors in inputs and target whose first dimension is the samples",
            got=_form_of(batch),
            cure=_SAY_THE_WEIGHT,
        )


def _is_near(value: float, target: float, tolerance: float) -> bool:
    return abs(value - target) <= tolerance * max(abs(target), 1e-12)


def _not_a_mean(
    loss: Objective, operation: str, target: float, average: float, cut: int, n: int
) -> SkipscopeError:
    return SkipscopeError(
        operation,
        "the loss of a batch is not the weighted mean of the losses of its two parts, so "
        f"batches cannot be averaged (loss: {loss.name})",
        expected=f"{target:.9g}, the loss of one batch of {n}",
        got=f"{average:.9g} from its parts of {cut} and {n - cut}",
        cure=(
            "say what a batch counts for: weight=lambda batch: ... (the loss's own denominator,"
            " e.g. the number of labels that are not ignored). Where the samples of a batch"
            " interact (a contrastive loss, batch statistics) no weight is right: pass one batch,"
            " or weight=lambda batch: 1.0 for the mean over these batches"
        ),
    )


def _normaliser_is_known(loss: Objective, batch: Batch) -> bool:
    return loss.weight_from == "loss" and isinstance(target_of(batch), Tensor)


def _form_of(batch: Batch) -> str:
    """Describe the structure of a batch: types, and the shapes of tensors.

    Example:
        >>> _form_of(([1, 2], torch.zeros(2)))
        '(a list of 2 int, a tensor of shape (2,))'
    """
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, tuple):
        return f"({', '.join(map(_form_of, batch[:4]))}{', ...' if len(batch) > 4 else ''})"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {list(batch)[:6]}"
    if isinstance(batch, list) and batch:
        return f"a list of {len(batch)} {type(batch[0]).__name__}"
    return f"a {type(batch).__name__}"


def _averages(
    model: nn.Module, loss: Objective, whole: Batch, cut: int, weights: Sequence[Callable[[Batch], float]]
) -> list[float]:
    """The mean of the losses of a batch's first ``cut`` samples and of the rest, under each weight."""
    parts = [rows(whole, slice(0, cut)), rows(whole, slice(cut, batch_size(whole)))]
    first, second = (float(loss(model, part).detach()) for part in parts)
    averages = []
    for weigh in weights:
        a, b = (float(weigh(part)) for part in parts)
        total = (a * first if a else 0.0) + (b * second if b else 0.0)
        averages.append(total / (a + b) if a + b else float("nan"))
    return averages


# --- readings of a loss ---


def _checked_scalar(
    function: Callable[..., Any], operation: str, model_or_output: Any, batch: Batch
) -> Tensor:
    value = function(model_or_output, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.dtype.is_floating_point:
        raise SkipscopeError(
            operation,
            "the loss is not a scalar",
            expected="a tensor with one floating-point element",
            got=(
                f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
                if isinstance(value, Tensor)
                else type(value).__name__
            ),
            cure=(
                'reduce it: .mean(), or reduction="mean"'
                if isinstance(value, Tensor)
                else "return the tensor itself, without .item()"
            ),
        )
    return (
        value if value.ndim == 0 else value.reshape(())
    )  # the tensor itself: some look for it in the output


def _loss_of_the_output(operation: str) -> Objective:
    def from_output(output: Any, batch: Batch) -> Tensor:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise SkipscopeError(
                operation,
                "no loss was given and the model's output carries none",
                expected="output.loss",
                got=f"an output of type {type(output).__name__}",
                cure=(
                    "pass a loss, e.g. torch.nn.functional.cross_entropy; for Hugging Face put 'labels' in"
                    " the batch"
                ),
            )
        return value

    def labels(shift: int) -> Callable[[Batch], float]:
        def count(batch: Batch) -> float:
            found = batch.get("labels") if isinstance(batch, Mapping) else None
            if not isinstance(found, Tensor):
                return batch_size(batch)
            return float((found[:, shift:] if found.ndim > 1 else found).ne(-100).sum())

        return count

    # Causal models shift the labels by one, masked models do not; the split-batch check decides.
    return Objective(
        "the output's own loss",
        lambda model, batch: from_output(forward(model, batch, operation), batch),
        labels(1),
        from_output=from_output,
        candidates=(labels(0), batch_size),
        why_no_samples="the model's own loss is one number a batch; pass sample_loss=",
    )


def _loss_of_output_and_target(loss: Callable[..., Any], operation: str) -> Objective:
    def from_output(output: Any, batch: Batch) -> Tensor:
        return call_loss(loss, output, target_of(batch, operation), operation)

    known = stock_loss(loss)
    fields: dict[str, Any] = {"why_no_samples": "not a stock torch loss; pass sample_loss="}
    if known is not None:
        fields = {
            "weight_from": "loss",
            "sums": known.reduction == "sum",
            "samples": lambda output, batch: known.samples(output, target_of(batch, operation)),
            "why_no_samples": None,
            "is_its_samples": True,
        }
    weight = (lambda batch: known.normaliser(target_of(batch, operation))) if known else batch_size
    return Objective(
        _name_of(loss),
        lambda model, batch: from_output(forward(model, batch, operation), batch),
        weight,
        from_output=from_output,
        **fields,
    )


def _name_of(loss: Any) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__name__", type(loss).__name__)


def _as_samples(values: Any, operation: str) -> Samples:
    if not isinstance(values, Tensor) or values.ndim == 0:
        raise SkipscopeError(
            operation,
            "sample_loss does not return one loss a sample",
            expected="a tensor of shape [samples]",
            got=f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__,
            cure='reduction="none", then .flatten(1).mean(1)',
        )
    values = values if values.ndim == 1 else values.flatten(1).mean(1)
    return values, torch.ones_like(values)
