"""Search for the first call with a result that is not finite, and for the first stale batch norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import Batches, Objective, tensors_in
from skipscope._numbers import short
from skipscope._option_words import VerdictCause
from skipscope._torch_private import without_modes
from skipscope.shortcuts import TracedCall
from skipscope.shortcuts.trace import recording

# Running variances that differ from those of the data by this factor are stale.
STALE = 1e3
_WORDS = {
    "softmax": "every entry of a row is masked",
    "log_softmax": "every entry of a row is masked",
    "scaled_dot_product_attention": "every entry of a row is masked",
    "sqrt": "the slope of a root at 0 is infinite",
    "div": "it divides by 0",
    "log": "it takes the logarithm of 0 or less",
    "norm": "the slope of a norm at 0 is undefined",
}
_CAUSES: dict[str, VerdictCause] = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "scaled_dot_product_attention": "softmax",
    "sqrt": "sqrt",
    "rsqrt": "sqrt",
    "pow": "sqrt",
    "div": "div",
    "rdiv": "div",
    "reciprocal": "div",
    "normalize": "div",
    "log": "log",
    "log2": "log",
    "log10": "log",
    "norm": "norm",
    "linalg_vector_norm": "norm",
    "vector_norm": "norm",
}
# Functions that give NaN outside of their domain.
_DOMAINS = {
    "acos",
    "asin",
    "acosh",
    "atanh",
    "log1p",
    "logit",
    "erfinv",
    "fmod",
    "remainder",
    "arccos",
    "arcsin",
}
# Functions used for masks, which insert infinities deliberately.
_MASKS = {"masked_fill", "where", "setitem", "fill", "new_full", "triu", "tril"}


class _Finite:
    """Listener for the first call whose result is not finite although its operands are."""

    def __init__(self) -> None:
        self.first: tuple[str, str, bool] | None = None  # function, module, whether NaN
        self.made: dict[Any, tuple[str, str]] = {}
        # Faults are stored by value, because a value may be overwritten in place later.
        self.known: dict[int, tuple[bool, bool]] = {}

    def __call__(self, call: TracedCall, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        with without_modes():
            given = [self.known.get(v, (False, False)) for v in call.operands]
            if call.index < 0 or not call.in_place:
                given += [_faults(t) for t in tensors_in((args, kwargs)) if t.is_floating_point()]
            results = [t for t in tensors_in(args[:1] if call.in_place else output) if t.is_floating_point()]
            faults = [_faults(t) for t in results]
        for value, fault in zip(call.results, faults):
            self.known[value] = fault
        nan_in, bad_in = any(nan for nan, _ in given), any(bad for _, bad in given)
        nan, bad = any(nan for nan, _ in faults), any(bad for _, bad in faults)
        new = (nan and not nan_in) or (bad and not bad_in and call.function not in _MASKS)
        if given and new and self.first is None:
            self.first = call.function, call.module, nan
        for t in results:
            if t.grad_fn is not None:
                self.made.setdefault(t.grad_fn, (call.function, call.module))

    def first_back(self, value: Tensor, weights: list[Tensor]) -> tuple[str, str, bool] | None:
        """The first node of the backward pass that turns a finite gradient into one that is not, or None."""
        found: list[tuple[str, str, bool]] = []

        def look(node: Any):
            name, module = self.made.get(node, (node.name().removesuffix("Backward0").lower(), ""))

            def hook(given: tuple[Tensor | None, ...], taken: tuple[Tensor | None, ...]) -> None:
                if not found and _finite(taken) and not _finite(given):
                    found.append((name, module, False))

            return hook

        seen, stack, handles = set[Any](), [value.grad_fn], []
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                handles.append(node.register_hook(look(node)))
                stack += [parent for parent, _ in node.next_functions]
        try:
            # backward() would call post-accumulate hooks, which may run an optimizer.
            torch.autograd.grad(value, weights, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            self.made.clear()
        return found[0] if found else None


def _faults(tensor: Tensor) -> tuple[bool, bool]:
    """Whether a tensor holds NaN, and whether it holds NaN or infinities."""
    value = tensor.detach()
    return bool(value.isnan().any()), not bool(value.isfinite().all())


def _finite(gradients: tuple[Tensor | None, ...]) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in gradients)


def first_nonfinite(model: nn.Module, data: Batches, loss: Objective) -> tuple[VerdictCause, str] | None:
    """Cause and description of the first call, forward or backward, whose result is not finite, or None."""
    try:
        for batch in data:
            watched = _Finite()
            with recording(model, watched, gradients=True):
                value = loss(model, batch)
            found = watched.first
            if found is None and value.requires_grad:
                found = watched.first_back(value, [p for p in model.parameters() if p.requires_grad])
            if found is not None:
                return _described(*found)
    except RuntimeError:
        return None
    return None


def _described(name: str, module: str, nan: bool) -> tuple[VerdictCause, str]:
    # These functions give NaN outside of their domain without an overflow. Any other NaN is a difference of
    # infinities.
    outside = nan and name in _DOMAINS
    cause = _CAUSES.get(name, "unexplained" if outside else "overflow")
    words = _WORDS.get(cause, "its result overflows" if not nan else "it gives NaN")
    place = f" in {module}" if module else ""
    return cause, f"{name}{place}: {words}"


def stale_norm(model: nn.Module, data: Batches, loss: Objective) -> str:
    """Description of the first batch norm in eval mode with stale running statistics, or ""."""
    found: list[str] = []

    def look(path: str, module: Any):
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].detach()
            if found or module.training or module.running_var is None or x.ndim < 2:
                return
            with without_modes():
                dims = [d for d in range(x.ndim) if d != 1]
                own = float(x.double().var(dims, unbiased=False).mean())
                running = float(module.running_var.double().mean())
            ratio = own / running if running > 0 else math.inf
            if math.isfinite(own) and not 1 / STALE < ratio < STALE:
                found.append(
                    f"the running variance of layer {path!r} is {short(running)}, the data's {short(own)}"
                )

        return hook

    norms = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not any(not m.training for _, m in norms):
        return ""
    handles = [m.register_forward_pre_hook(look(p, m)) for p, m in norms]
    try:
        with torch.no_grad():
            loss(model, data.first())
    except RuntimeError:
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
