"""Every private name of torch that skipscope uses, each behind a documented function.

No name is looked up when skipscope is imported. A name that a version of torch lacks is refused in an error,
or replaced by public functions with the same results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import CodeType, FrameType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipscope._errors import SkipscopeError

# Names that are looked up below, relative to ``torch``.
NAMES = (
    "_C.DisableTorchFunction",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._functorch.get_unwrapped",
    "_C._current_graph_task_id",
    "_C._autograd._get_current_graph_task_keep_graph",
    "_C._will_engine_execute_node",
    "autograd.Variable._execution_engine.queue_callback",
    "autograd.Variable._execution_engine.run_backward",
    "_foreach_norm",
    "_foreach_copy_",
    "_weight_norm",
    "ops.mkldnn._linear_pointwise",
    "_C.ScriptFunction",
    "_C.ScriptMethod",
)


@functools.cache
def named(path: str) -> Any:
    """Look up ``torch.<path>``.

    Raises:
        SkipscopeError: this version of torch has no such name.
    """
    found: Any = torch
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise SkipscopeError(
                "torch",
                f"this torch has no torch.{path}, which skipscope needs",
                expected="a version that skipscope was tested with: see Promises in its documentation",
                got=f"torch {torch.__version__}",
                cure="install such a version of torch, or a newer skipscope",
            )
    return found


# --- calls of torch's functions ---


def without_modes() -> AbstractContextManager[Any]:
    """Disable ``__torch_function__`` of modes and tensor subclasses inside."""
    return named("_C.DisableTorchFunction")()


def seen_by_modes() -> Any:
    """Whether function modes and tensor subclasses see calls now, for :func:`set_seen_by_modes`."""
    read = getattr(torch._C, "_get_torch_function_state", None)  # older versions of torch have none
    return None if read is None else read()


def set_seen_by_modes(state: Any) -> None:
    """Put back what :func:`seen_by_modes` gave."""
    if state is not None:
        named("_C._set_torch_function_state")(state)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is a wrapper of ``torch.vmap`` or ``torch.func``."""
    return named("_C._functorch.is_functorch_wrapped_tensor")(tensor)


def untransformed(tensor: Tensor) -> Tensor:
    """Unwrap a tensor for which :func:`is_transformed` is true."""
    return named("_C._functorch.get_unwrapped")(tensor)


def inner_tensors(tensor: Tensor) -> tuple[Tensor, ...]:
    """The inner tensors of a tensor subclass.

    Examples are the shard of a DTensor and the result of an unfinished collective.
    """
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return ()
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # type: ignore[operator]
    return tuple(part for part in parts if isinstance(part, Tensor))


def is_fused_weight_norm(func: Any) -> bool:
    """Whether a function is the fused weight norm; always False if torch has none."""
    return func is getattr(torch, "_weight_norm", None)


def norms_of(tensors: Sequence[Tensor], order: int, dtype: torch.dtype) -> list[Tensor]:
    """Compute the norm of each tensor, with a single call on a GPU."""
    if not hasattr(torch, "_foreach_norm"):
        return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors]
    return list(torch._foreach_norm(list(tensors), order, dtype=dtype))


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, with a single call on a GPU."""
    if not hasattr(torch, "_foreach_copy_"):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return
    torch._foreach_copy_(list(targets), list(sources))


def fused_linear() -> Any:
    """OneDNN's fused linear layer and activation, ``(input, weight, bias, name, [], algorithm)``."""
    return named("ops.mkldnn._linear_pointwise")


def schemas_of(function: str) -> list[list[tuple[str, bool]]]:
    """Of each form of torch's operator of that name, its arguments, and whether each goes by keyword alone.

    Empty where there is no such operator, or this torch does not say.
    """
    operator: Any = getattr(torch.ops.aten, function, None)
    if operator is None or not hasattr(operator, "overloads"):
        return []
    schemas = (getattr(getattr(operator, name), "_schema", None) for name in operator.overloads())
    return [[(a.name, a.kwarg_only) for a in schema.arguments] for schema in schemas if schema is not None]


def memory_without_address(storage: Any) -> int:
    """Identifier of a storage without an address (on the meta device), or 0 if torch has none."""
    return int(getattr(storage, "_cdata", 0))


# Called with a scripted function or method, a callable that runs it, and the arguments of the call.
ScriptListener = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _ScriptedCalls:
    """Interceptor of calls of scripted functions and methods, which function modes do not see.

    While a listener is registered, torch's script classes are patched to call the listener of the thread.
    """

    def __init__(self):
        self._lock, self._users, self._local = threading.Lock(), 0, threading.local()
        self._kinds: dict[Any, Callable[..., Any]] = {}

    @contextmanager
    def heard_by(self, listener: ScriptListener) -> Iterator[None]:
        """Pass this thread's calls inside through ``listener``."""
        before = getattr(self._local, "listener", None)
        self._local.listener = listener
        self._change_users(1)
        try:
            yield
        finally:
            self._change_users(-1)
            self._local.listener = before

    def _change_users(self, by: int) -> None:
        with self._lock:
            self._users += by
            if by > 0 and self._users == 1:
                kinds = named("_C.ScriptFunction"), named("_C.ScriptMethod")
                self._kinds = {kind: kind.__call__ for kind in kinds}
                for kind, call in self._kinds.items():
                    kind.__call__ = self._through_listener(call)
            elif not self._users:
                for kind, call in self._kinds.items():
                    kind.__call__ = call

    def _through_listener(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def heard(function: Any, *args: Any, **kwargs: Any) -> Any:
            listener = getattr(self._local, "listener", None)
            if listener is None:
                return call(function, *args, **kwargs)
            return listener(function, functools.partial(call, function), args, kwargs)

        return heard


scripted_calls = _ScriptedCalls()


# --- custom functions ---

_FUNCTION = os.path.join(os.path.dirname(torch.__file__), "autograd", "function.py")
# Up to torch 2.13, ``apply`` is written in Python and has a frame.
_APPLY_HAS_A_FRAME = isinstance(torch.autograd.Function.apply, MethodType)
_applied: dict[CodeType, tuple[str, str] | None] = {}


def applied_function(frame: FrameType) -> tuple[str, str] | None:
    """Module and name of the ``autograd.Function`` that a frame applies, or None if it applies none.

    The frame is that of ``apply``, or from torch 2.14 on, where ``apply`` has no frame, that of ``forward``.
    """
    code = frame.f_code
    if _APPLY_HAS_A_FRAME:
        is_apply = code.co_filename == _FUNCTION and code.co_name == "apply"
        kind = frame.f_locals.get("cls") if is_apply else None
        return None if kind is None else (kind.__module__, kind.__name__)
    if code not in _applied:
        kinds = (k for k in _every_function(torch.autograd.Function) if _code_of_forward(k) is code)
        _applied[code] = next(((kind.__module__, kind.__name__) for kind in kinds), None)
    return _applied[code]


def _every_function(kind: Any) -> Iterator[Any]:
    for each in kind.__subclasses__():
        yield each
        yield from _every_function(each)


def _code_of_forward(kind: Any) -> Any:
    return getattr(inspect.unwrap(kind.forward), "__code__", None)


def arguments_applied(frame: FrameType) -> list[Any]:
    """Arguments of the ``autograd.Function`` of :func:`applied_function`."""
    code, found = frame.f_code, frame.f_locals
    if code.co_filename == _FUNCTION:
        return list(found.get("args", ()))
    count = code.co_argcount + code.co_kwonlyargcount
    given = [found[name] for name in code.co_varnames[:count] if name in found]
    if code.co_flags & inspect.CO_VARARGS:
        given += found.get(code.co_varnames[count], ())
    return [value for value in given if not isinstance(value, torch.autograd.function.FunctionCtx)]


# --- compiled code ---


def compiler_is_loaded() -> bool:
    """Whether torch's compiler is loaded, as after any compilation; loading it takes seconds."""
    return "torch._dynamo" in sys.modules


def as_written() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly inside: hooks set after compilation would silently be skipped."""
    return torch.compiler.set_stance("force_eager") if compiler_is_loaded() else contextlib.nullcontext()


def compiled_from(module: Any) -> nn.Module | None:
    """The original module of a module compiled by ``torch.compile``, or None."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    kind = getattr(compiler, "OptimizedModule", None)
    return module._orig_mod if kind is not None and isinstance(module, kind) else None


# --- hooks ---


def gradient_hooks(parameter: Tensor) -> list[Callable[..., Any]]:
    """Gradient hooks of a parameter."""
    return list((getattr(parameter, "_backward_hooks", None) or {}).values())


def accumulation_hooks(parameter: Tensor) -> list[Callable[..., Any]]:
    """Hooks of a parameter that run after its gradient has been accumulated."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Forward hooks and forward pre-hooks of a module."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@contextmanager
def accumulation_hooks_off(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Disable post-accumulate hooks inside: they may run an optimizer, and a measurement must not step."""
    kept = [p._post_accumulate_grad_hooks for p in parameters]
    try:
        for p in parameters:
            p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    finally:
        for p, hooks in zip(parameters, kept):
            p._post_accumulate_grad_hooks = hooks


# --- several processes ---


def shared_store() -> Any:
    """The key-value store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def begin_fsdp(unit: Any) -> None:
    """Run the lazy initialisation of an FSDP2 unit, which its first forward pass would do."""
    unit._get_fsdp_state()._lazy_init()


def fsdp_dtype(unit: Any) -> torch.dtype | None:
    """Compute dtype of an FSDP2 unit, or None for the dtype of its weights."""
    return unit._get_fsdp_state()._mp_policy.param_dtype


def step_fsdp(unit: Any, entering: bool) -> None:
    """Run the pre-forward or post-forward step of an FSDP2 unit, without a forward pass."""
    state = unit._get_fsdp_state()
    state._pre_forward(unit, (), {}) if entering else state._post_forward(unit, (), None)


def fsdp_groups(unit: Any) -> list[Any]:
    """Parameter groups of an FSDP2 unit: several in newer versions of torch, at most one in 2.6."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def gathered_by_fsdp(unit: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of sharded and unsharded weights of an FSDP2 unit, for the weights gathered so far."""
    weights = [weight for group in fsdp_groups(unit) for weight in group.fsdp_params]
    return [(w.sharded_param, w.unsharded_param) for w in weights if hasattr(w, "_unsharded_param")]


# --- backward passes ---


def graph_task() -> int:
    """Id of the backward pass that this thread runs, or -1 outside a backward pass."""
    return named("_C._current_graph_task_id")()


def keeps_graph() -> bool:
    """Whether the current backward pass retains its graph."""
    return named("_C._autograd._get_current_graph_task_keep_graph")()


def gradients(
    roots: Sequence[Any], sources: Sequence[Tensor], rows: Sequence[Tensor], *, batched: bool = False
) -> list[Tensor | None]:
    """Compute ``torch.autograd.grad(roots, sources, rows, is_grads_batched=batched)``, retaining the graph.

    The public function imports sympy to compare shapes, which takes a second. It is the fallback if torch
    lacks one of the private names.

    Args:
        roots: tensors and gradient edges.
        sources: tensors to differentiate with respect to; the gradient is None if a source is not reached.
        rows: gradient for each root, of its shape; if batched, ``[n, *shape]``.
        batched: whether to compute all rows at once with vmap.
    """
    try:
        engine = named("autograd.Variable._execution_engine.run_backward")
        vmap = importlib.import_module("torch._vmap_internals")._vmap if batched else None
    except (SkipscopeError, ImportError, AttributeError):
        return list(
            torch.autograd.grad(
                roots, sources, rows, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        )

    def products(*given: Tensor) -> tuple[Tensor | None, ...]:
        return engine(
            tuple(roots), given, True, False, tuple(sources), allow_unreachable=True, accumulate_grad=False
        )

    if vmap is None:
        return list(products(*rows))
    return list(vmap(products, 0, 0, allow_none_pass_through=True)(*rows))


def accumulator(parameter: Tensor) -> Any:
    """The AccumulateGrad node of a parameter."""
    with torch.enable_grad():
        return torch.autograd.graph.get_gradient_edge(parameter).node


def will_run(node: Any) -> bool | None:
    """Whether the current backward pass runs the AccumulateGrad node of a parameter.

    Returns:
        True or False, or None if ``torch.autograd.grad`` returns the gradient instead of accumulating it.
    """
    try:
        return named("_C._will_engine_execute_node")(node)
    except RuntimeError:
        return None


def runs_whole_graph() -> bool:
    """Whether the current backward pass computes all gradients, and not only those of ``inputs=``."""
    return will_run(accumulator(torch.zeros((), requires_grad=True))) is True


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` at the end of the current backward pass."""
    named("autograd.Variable._execution_engine.queue_callback")(callback)


def keywords_of_call() -> dict[str, Any]:
    """Keyword arguments of the current module call, read two frames up from its global forward pre-hook.

    Global hooks do not receive keywords. The dict belongs to this call alone, so a replaced entry affects
    only its forward pass.
    """
    found = sys._getframe(2).f_locals.get("kwargs")
    return found if isinstance(found, dict) else {}


def count_backward_passes() -> int:
    """Number of backward passes begun in this process, including one by this call: torch numbers them."""
    numbers: list[int] = []
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True) * 1.0
        probe.register_hook(lambda _: numbers.append(graph_task()))
        torch.autograd.grad(probe, [probe], torch.ones(()))
    return numbers[0]


class _Quiet:
    """Handle of :func:`quiet_about_global_hooks`."""

    def __init__(self):
        self._filter = None
        if compiler_is_loaded():
            warnings.filterwarnings(
                "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
            )
            self._filter = warnings.filters[0]

    def remove(self) -> None:
        """Restore the warning."""
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        self._filter = None


def quiet_about_global_hooks() -> _Quiet:
    """Silence the warning of compiled modules about global hooks, until ``remove``."""
    return _Quiet()


class _Eager:
    """Counted switch that makes compiled code run eagerly: torch's stance is global to the process."""

    def __init__(self):
        self._users, self._stance = 0, None

    def begin(self) -> bool:
        """Make compiled modules run eagerly. Returns False if the compiler is not loaded."""
        if not compiler_is_loaded():
            return False
        self._users += 1
        if self._users == 1:
            self._stance = torch.compiler.set_stance("force_eager")
        return True

    def end(self) -> None:
        """Restore torch's stance if this is the last user."""
        self._users -= 1
        if not self._users and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


eager = _Eager()
