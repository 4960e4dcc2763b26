"""``path_spectrum``: the gradient by the number of branches crossed (sampled by Veit et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from skipscope import _sharding
from skipscope._data import Batch, Objective, map_tensors
from skipscope._errors import SkipscopeError
from skipscope._model_calls import no_gradient
from skipscope._option_words import ModelMode
from skipscope._progress import track
from skipscope._public_call import public_call
from skipscope._subject import Subject, prepare
from skipscope._untouched import random_state_kept
from skipscope.flow._flow_measures import PathSpectrum
from skipscope.flow._gradient_flow import mode_of
from skipscope.flow.passes._gradient_pass import shares_of
from skipscope.flow.passes._gradient_seed import backward_error
from skipscope.flow.passes._tensor_norms import norm_of
from skipscope.flow.paths._path_angles import MAX_LENGTHS, PathAngleBackward
from skipscope.flow.paths._segments import LengthGradients, PathLengthBackward, cut_forward
from skipscope.shortcuts import Boundary, meaning, tap_boundaries


@public_call("path_spectrum")
def path_spectrum(
    model: nn.Module,
    data: Any,
    loss: Any = None,
    wrt: Boundary | nn.Parameter | str | None = None,
    *,
    found: Any = None,
    batched: bool | None = None,
    max_bytes: int = 2**28,
    exact: bool | None = None,
    seed: int = 0,
    weight: Callable[[Batch], float] | None = None,
) -> PathSpectrum:
    """Decompose the gradient by the number of branches crossed, exactly, over all 2^L paths, in one pass.

    Works for any graph of shortcuts: chains, nested or dense shortcuts, several merges per block. The forward
    pass is cut at each merge; in the backward pass each cut holds a gradient for each possible length. Local;
    for a sharded model (FSDP2) collective, with full weights on every rank, and the spectrum of the calling
    rank's data.

    Args:
        model: any eager module, run in its current modes and restored afterwards.
        data: a batch ``(inputs, target)``, a Mapping, or a re-iterable of batches.
        loss: ``loss(output, target)``; not needed if the output carries ``.loss``.
        wrt: boundary or parameter at which the paths end, or its name; by default the first boundary.
        found: shortcuts whose branches are counted; by default all shortcuts found.
        batched: whether to carry all lengths through the backward pass at once (torch's vmap) or one after
            the other; by default whichever is faster.
        max_bytes: bound on the gradients at the input and output of a segment at a time. Further memory holds
            the forward pass, and a gradient for each length at each pending cut: in a chain at two cuts at a
            time. Completed segments are freed.
        exact: False for an estimate that carries 256 gradients for any number of lengths, with its error;
            None for an estimate beyond 256 branches only.
        seed: seed of the random numbers drawn inside (dropout).
        weight: batch -> its weight in the mean over batches.

    Returns:
        ``norms[k]``, the L2 norm of the sum over all paths that cross k branches, and its summary.

    Raises:
        SkipscopeError: ``wrt`` is unknown, or no path leads there from the loss.

    Example:
        >>> import skipscope as ss
        >>> model = ss.reference.deep_mlp(depth=4, width=16, inputs=16, classes=16, shortcut="identity")
        >>> batch = torch.randn(8, 16), torch.zeros(8, 16)
        >>> paths = ss.path_spectrum(model, batch, nn.functional.mse_loss)
        >>> len(paths.norms), paths.residual < 1e-5
        (5, True)
    """
    subject = prepare(model, data, loss, "path_spectrum", weight=weight, found=found)
    return paths_of(subject, wrt, batched=batched, max_bytes=max_bytes, exact=exact, seed=seed)


def paths_of(
    subject: Subject,
    wrt: Boundary | nn.Parameter | str | None = None,
    *,
    batched: bool | None = None,
    max_bytes: int = 2**28,
    exact: bool | None = None,
    seed: int = 0,
) -> PathSpectrum:
    """Run :func:`path_spectrum` on a prepared subject. Local, or collective."""
    subject = subject.with_own_inputs()
    model, batches, objective = subject.model, subject.data, subject.loss
    found, target = subject.found, _target(subject.model, subject.boundaries, wrt)
    is_estimate = exact is False or (exact is None and len(found) > MAX_LENGTHS)
    backward = PathAngleBackward if is_estimate else PathLengthBackward
    sums = _Sums(isinstance(target, Tensor), len(found))
    with subject.running(seed), _sharding.whole_weights(model):
        mode = mode_of(model)
        for i, (batch, share) in enumerate(track(shares_of(batches, objective, "path_spectrum"), "paths")):
            given = map_tensors(batch, Tensor.clone) if getattr(found, "writes_inputs", False) else batch
            with random_state_kept(seed + i):
                forward = cut_forward(model, given, objective, found, target)
            if not forward.loss.requires_grad:
                raise no_gradient("path_spectrum", model)
            sums.loss += share * float(forward.loss.detach())
            one = backward(forward, batched=batched, max_bytes=max_bytes)
            gradients = _run(one)
            with random_state_kept(seed + i):  # the same dropout again
                plain = _plain_gradient(model, batch, objective, target)
            sums.add(one, gradients, plain, share)
    if isinstance(target, Boundary):
        name = target.name
    else:
        name = next(n for n, p in model.named_parameters() if p is target)
    return sums.result(name, mode, meaning(model))


def _run(backward: PathLengthBackward) -> LengthGradients | None:
    """The gradients at the target, or None if this forward pass has no target or no path reaches it."""
    try:
        return next(iter(backward.run()), None)
    except RuntimeError as error:
        raise backward_error("path_spectrum", error) from error


def _with_errors(
    norms: np.ndarray, window: tuple[int, int], branches: int, floor: float
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Norms of all lengths of an estimate, their errors (at least ``floor``), and a note."""
    low, count = window
    inside = norms[low : low + count]
    eighth = max(1, len(inside) // 8)
    ends = ([] if low == 0 else [inside[:eighth]]) + ([] if low + count > branches else [inside[-eighth:]])
    floor = max([floor, *(float(end.max()) for end in ends)])
    norms = np.concatenate([norms, np.zeros(max(0, branches + 1 - len(norms)))])[: branches + 1]
    note = (
        f"Resolved: {count} of {branches + 1} lengths, {low} to {min(branches, low + count - 1)}. Error of"
        f" each norm: about {floor:.2g}, from the lengths beyond, the far ends of these, and rounding."
    )
    return norms, np.full(len(norms), floor), (note,)


def _target(model: nn.Module, points: tuple[Boundary, ...], wrt: Any) -> Boundary | nn.Parameter:
    """The boundary or parameter at which the paths end."""
    parameters = dict(model.named_parameters())
    if wrt is None:
        return points[0]
    if isinstance(wrt, nn.Parameter) and any(p is wrt for p in parameters.values()):
        return wrt
    name = wrt if isinstance(wrt, str) else getattr(wrt, "name", None)
    point = next((point for point in points if point.name == name), None)
    if point is not None or name in parameters:
        return point or parameters[str(name)]
    raise SkipscopeError(
        "path_spectrum",
        "wrt is neither a boundary nor a parameter of this model",
        expected="one of " + ", ".join([p.name for p in points][:8]) + ", ..., or a parameter's name",
        got=f"{wrt!r:.60}",
        cure="[b.name for b in ss.gradient_flow(model, data, loss).boundaries]",
    )


def _plain_gradient(
    model: nn.Module, batch: Batch, loss: Objective, target: Boundary | nn.Parameter
) -> Tensor | None:
    """The total gradient, from an ordinary backward pass."""
    if not isinstance(target, Boundary):
        return torch.autograd.grad(loss(model, batch), target, allow_unused=True)[0]
    reached: list[Tensor] = []

    def reach(_: int, activation: Tensor) -> Tensor:
        reached.append(activation.detach().requires_grad_())
        return reached[-1].clone()  # a leaf could not be changed in place by what follows

    with tap_boundaries(model, (target,), reach):
        value = loss(model, batch)
    return torch.autograd.grad(value, reached[0], allow_unused=True)[0] if reached else None


class _Sums:
    """Sums over batches: of norms if the target is an activation, of gradients if it is a parameter.

    Args:
        is_shared: whether the target is the same in every batch (a parameter).
        branches: number of shortcuts that are counted.

    Attributes:
        norms: norms by length, of the plain gradient, and of its difference from the sum over all lengths.
        vectors: the corresponding gradients, for a shared target.
        window: first length and number of lengths of an estimate.
        folded: norm outside of the window of an estimate.
    """

    def __init__(self, is_shared: bool, branches: int):
        self.is_shared, self.branches, self.loss = is_shared, branches, 0.0
        self.norms: dict[int | Literal["plain", "rest"], float] = {}
        self.vectors: dict[int | Literal["plain", "rest"], Tensor] = {}
        self.methods: set[str] = set()
        self.window: tuple[int, int] | None = None
        self.folded, self.rounding = 0.0, 0.0

    def add(
        self,
        backward: PathLengthBackward,
        gradients: LengthGradients | None,
        plain: Tensor | None,
        share: float,
    ) -> None:
        """Add the gradients of a batch."""
        self.methods |= backward.methods
        if isinstance(backward, PathAngleBackward):
            self.window = self.window or backward.window(gradients, self.branches)
            angles, gradients = gradients, backward.lengths(gradients, self.window)
            if angles is not None and gradients is not None:
                self.folded += backward.folded(angles, gradients) * backward.unit * share
                self.rounding = 16 * torch.finfo(angles.rows.dtype).eps
        if gradients is None or plain is None:
            return
        whole = plain.detach().double() * share
        rest = whole.neg()
        self._accumulate("plain", whole)
        for i, row in enumerate(gradients.rows):
            row = row.detach().double() * (backward.unit * share)
            rest += row
            self._accumulate(gradients.low + i, row)
        self._accumulate("rest", rest)

    def _accumulate(self, key: int | Literal["plain", "rest"], gradient: Tensor) -> None:
        if self.is_shared:
            gradient = self.vectors[key] = self.vectors[key] + gradient if key in self.vectors else gradient
        before = 0.0 if self.is_shared else self.norms.get(key, 0.0)
        self.norms[key] = math.hypot(before, norm_of(gradient))

    def result(self, name: str, mode: ModelMode, meaning: str) -> PathSpectrum:
        """Build the result."""
        if not self.norms:
            raise SkipscopeError(
                "path_spectrum",
                f"no path leads from the loss to {name}",
                layer=name,
                cure="choose another wrt; ss.gradient_flow says where the network comes apart",
            )
        plain, rest = self.norms["plain"], self.norms["rest"]
        of = {k: norm for k, norm in self.norms.items() if isinstance(k, int)}
        # Values overwritten in place get zero gradients, possibly with lengths beyond the number of branches.
        highest = max(k for k, norm in of.items() if norm or k <= self.branches)
        norms = np.array([of.get(k, 0.0) for k in range(highest + 1)])
        mean = float(norms @ np.arange(len(norms)) / norms.sum()) if norms.sum() else math.nan
        method = "mixed" if len(self.methods) == 2 else next(iter(self.methods), "batched")
        errors, notes = None, ()
        if self.window is not None:
            floor = max(self.folded, self.rounding * plain)
            norms, errors, notes = _with_errors(norms, self.window, self.branches, floor)
            method = f"estimate, {method}"
        return PathSpectrum(
            norms,
            mean,
            rest / plain if plain else rest,
            plain,
            len(norms) - 1,
            name,
            method,
            self.loss,
            mode,
            meaning,
            errors,
            notes,
        )
