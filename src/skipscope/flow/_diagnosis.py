"""Where numbers stop being finite, and which batch norm does not fit the data: passes that run only when asked why."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._data import Batches, Objective
from skipscope._numbers import short
from skipscope.flow._site_readings import _QUERIES, _tensors

# Running variances this many times off those of the data are stale.
STALE = 1e3
_WORDS = {
    "softmax": "every entry of a row is masked", "log_softmax": "every entry of a row is masked",
    "scaled_dot_product_attention": "every entry of a row is masked", "sqrt": "the slope of a root at 0 is infinite",
    "div": "it divides by 0", "log": "it takes the logarithm of 0 or less", "norm": "the slope of a norm at 0 is undefined",
}  # fmt: skip
_CAUSES = {
    "softmax": "softmax", "log_softmax": "softmax", "scaled_dot_product_attention": "softmax", "sqrt": "sqrt", "rsqrt": "sqrt",
    "sqrt_": "sqrt", "div": "div", "truediv": "div", "__truediv__": "div", "true_divide": "div", "rtruediv": "div",
    "__rtruediv__": "div", "__rdiv__": "div", "reciprocal": "div", "normalize": "div", "log": "log", "log2": "log", "log10": "log",
    "norm": "norm", "linalg_vector_norm": "norm", "vector_norm": "norm", "pow": "sqrt", "__pow__": "sqrt",
}  # fmt: skip


_DOMAINS = frozenset(
    {"acos", "asin", "acosh", "atanh", "log1p", "logit", "erfinv", "fmod", "remainder", "arccos", "arcsin"}
)
# They put infinities in on purpose: a mask.
_MASKS = frozenset(
    {"masked_fill", "masked_fill_", "where", "__setitem__", "fill_", "full_like", "new_full", "triu", "tril"}
)


class _Finite(TorchFunctionMode):
    """Notes the first call whose result is not finite where its operands are, and which call made which node."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.stack: list[str] = []
        self.first: tuple[str, str, bool] | None = None  # function, module, whether NaN
        self.made: dict[Any, tuple[str, str]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _QUERIES:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            given = [t for t in _tensors(args, kwargs) if t.is_floating_point()]
            nan_in = any(bool(t.detach().isnan().any()) for t in given)
            bad_in = nan_in or any(not bool(t.detach().isfinite().all()) for t in given)
        output = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            results = [t for t in _tensors((output,), None) if t.is_floating_point()]
            nan = any(bool(t.detach().isnan().any()) for t in results)
            bad = nan or any(not bool(t.detach().isfinite().all()) for t in results)
            module = self.stack[-1] if self.stack else ""
            new = (nan and not nan_in) or (bad and not bad_in and name not in _MASKS)
            if given and new and self.first is None:
                self.first = name, module, nan
            for t in results:
                if t.grad_fn is not None:
                    self.made.setdefault(t.grad_fn, (name, module))
        return output

    def enter(self, path: str):
        """A hook that notes which module runs."""

        def hook(*_: Any) -> None:
            self.stack.append(path)

        return hook

    def leave(self, *_: Any) -> None:
        """A hook that notes that the module is over."""
        if self.stack:
            self.stack.pop()

    def first_back(self, value: Tensor, weights: list[Tensor]) -> tuple[str, str, bool] | None:
        """The first node, going back, that takes a finite gradient and gives one that is not."""
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
            # Not backward(): some people run their optimizer in hooks that it calls.
            torch.autograd.grad(value, weights, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            self.made.clear()
        return found[0] if found else None


def _finite(gradients: tuple[Tensor | None, ...]) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in gradients)


def first_nonfinite(model: nn.Module, data: Batches, loss: Objective) -> tuple[str, str] | None:
    """(cause, words) for the first call whose result is not finite while its operands were, or the first going back."""
    watched = _Finite(model)
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(watched.enter(path)))
        handles.append(module.register_forward_hook(watched.leave))
    try:
        for batch in data:
            with watched:
                value = loss(model, batch)
            found = watched.first
            if found is None and value.requires_grad:
                found = watched.first_back(value, [p for p in model.parameters() if p.requires_grad])
            if found is not None:
                return _told(*found)
            watched.stack.clear()
    except RuntimeError:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _told(name: str, module: str, nan: bool) -> tuple[str, str]:
    # Outside their domain these give NaN although nothing overflows; elsewhere it is an infinity less another.
    outside = nan and name.rstrip("_") in _DOMAINS
    cause = _CAUSES.get(name, "unexplained" if outside else "overflow")
    words = _WORDS.get(cause, "its result overflows" if not nan else "it gives NaN")
    place = f" in {module}" if module else ""
    return cause, f"{name}{place}: {words}"


def stale_norm(model: nn.Module, data: Batches, loss: Objective) -> str:
    """The first batch norm in eval mode whose running variance is far from that of the data, in words; else ""."""
    found: list[str] = []

    def look(path: str, module: Any):
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].detach()
            if found or module.training or module.running_var is None or x.ndim < 2:
                return
            with torch._C.DisableTorchFunction():
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
