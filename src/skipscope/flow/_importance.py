"""``importance``: the cost in loss and in flow of removing each shortcut and each branch alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipscope._data import Batch
from skipscope._errors import SkipscopeError
from skipscope._progress import track
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope._untouched import one_snapshot, private_copy, untouched
from skipscope.flow._flow_measures import Cost, Importance, ImportanceOf
from skipscope.flow._flow_result import GradientFlow
from skipscope.flow._gradient_flow import flow_of
from skipscope.shortcuts import ablate, meaning, one_edit, refuse_another_architecture


@public_call("importance")
def importance(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    found: Any = None,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
    allow_empty: bool = False,
) -> Importance:
    """Remove each shortcut alone, lesion each branch alone (Veit et al. 2016), and measure the costs.

    Nothing is trained. The twins share the model's parameters. Local.

    Args:
        model: any eager module, run in its current modes and restored afterwards.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; not needed if the output carries ``.loss``.
        found: shortcuts to try; by default all shortcuts found.
        seed: seed of the random numbers drawn inside (dropout).
        weight: batch -> its weight in the mean over batches.
        allow_empty: whether to return an empty ranking instead of an error if there are no shortcuts.

    Raises:
        SkipscopeError: data, loss or model cannot be read; the loss has no gradient; there is no shortcut to
            try, or the shortcuts given were found on another architecture.

    Example:
        >>> import torch, skipscope as ss
        >>> model = ss.reference.deep_mlp(depth=4, width=16, inputs=16, classes=16, shortcut="identity")
        >>> rank = ss.importance(model, (torch.randn(8, 16), torch.zeros(8, 16)), nn.functional.mse_loss)
        >>> len(rank), rank.ranked[0].removed.loss_cost is not None
        (4, True)
    """
    subject = prepare(model, data, loss, "importance", weight=weight)
    chosen = subject.found if found is None else found
    if not len(chosen) and not allow_empty:
        raise SkipscopeError(
            "importance",
            "there is no shortcut to try",
            expected="at least one shortcut",
            got=f"{type(subject.model).__name__}: {len(subject.found)} found, none chosen",
            cure="look at ss.find_shortcuts(model, inputs); allow_empty=True gives an empty ranking",
        )
    refuse_another_architecture(subject.model, chosen, "importance")
    return importance_of(subject, chosen, seed)


def importance_of(subject: Subject, found: Any = None, seed: int = 0) -> Importance:
    """Run :func:`importance` on a prepared subject, for the shortcuts in ``found``, or for all. Local."""
    subject = subject.with_own_inputs()
    model, chosen = subject.model, subject.found if found is None else found
    # The twins share the model's parameters, so the model is restored after all of them.
    with one_snapshot(model), untouched(model, seed=seed, operation="importance"):
        return _importance(subject, chosen, seed)


def _importance(subject: Subject, chosen: Any, seed: int) -> Importance:
    model = subject.model
    before = flow_of(subject, seed)
    stale = any(
        isinstance(m, _BatchNorm) and m.track_running_stats and not m.training for m in model.modules()
    )
    rows, copied = [], None
    if meaning(model) == "as built":  # an edited twin is edited further in copies of its own
        with suppress(SkipscopeError):  # each edit says then why there can be no copy
            copied = private_copy(model, "importance", share=True)
    with one_snapshot(*() if copied is None else (copied,)):
        for i in track(range(len(chosen)), "importance"):
            rows.append(_importance_of_one(subject, chosen[i : i + 1], before, copied, stale, seed))
    notes = [f"{row.name}: {row.why}" for row in rows if row.why]
    if stale:
        notes.append(
            "Batch-norm statistics of every twin were recalibrated on the data before it was measured."
        )
    return Importance(tuple(rows), before.loss, before.verdict.fall_decades, before.mode, tuple(notes))


def _importance_of_one(
    subject: Subject, edit: Any, before: GradientFlow, copied: nn.Module | None, stale: bool, seed: int
) -> ImportanceOf:
    """Measure the costs of one shortcut. ``copied`` is a copy on which edits can be switched, or None."""
    costs, reasons, model = {}, [], subject.model
    for how in ("remove", "lesion"):
        try:
            if copied is None:
                after = _flow(subject, ablate(model, edit, how=how, share=True), stale, seed)
            else:
                with untouched(copied, operation="importance"), one_edit(copied, model, edit, how):
                    after = _flow(subject, copied, stale, seed)
            costs[how] = cost(before, after)
        except SkipscopeError as error:
            reasons.append(f"{how}: {error.problem}")
    one = edit[0]
    why = "; ".join(reasons) or None
    return ImportanceOf(one.name, one.kind, costs.get("remove"), costs.get("lesion"), why)


def _flow(subject: Subject, twin: nn.Module, stale: bool, seed: int) -> GradientFlow:
    if stale:
        subject.recalibrate(twin)
    return flow_of(subject.twin(twin), seed)


def cost(before: GradientFlow, after: GradientFlow) -> Cost:
    """Cost of an edit from the measurements before and after it."""
    was, now = before.verdict.fall_decades, after.verdict.fall_decades
    change = None if was is None or now is None else now - was
    return Cost(after.loss, after.loss - before.loss, now, change, after.verdict.state)
