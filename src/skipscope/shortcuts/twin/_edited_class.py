"""The classes of edited modules: subclasses of the same name whose methods begin an edited pass.

Weights, ``state_dict`` keys and attributes of a module stay unchanged. A forward that was set on the instance
moves to another attribute, since it would shadow the class's forward.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._rebinding import eager
from skipscope._torch_private import forward_hooks
from skipscope.shortcuts.twin import _compiled_pass, _eager_pass
from skipscope.shortcuts.twin._plan import PLAN, Group, Plan, operation_of, plan_of, shares_parameters

_FORWARD = "_skipscope_forward"


def follow(module: nn.Module, group: Group) -> Plan:
    """Turn a module into an edited module of ``group``, and return its plan."""
    plan = plan_of(module)
    if plan is None:
        plan = module.__dict__[PLAN] = Plan(group)
        own = module.__dict__.pop("forward", None)
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            module.__dict__[_FORWARD] = own
        module.__class__ = _edited_class(type(module))
    elif plan.group is not group:
        # An edited twin is edited again: move all its modules to the new group.
        for other in module.modules():
            if (old := plan_of(other)) is not None:
                group.has_readers |= old.group.has_readers
                group.runs_eagerly |= old.group.runs_eagerly
                group.has_compiled |= old.group.has_compiled
                old.group = group
                group.sites |= old.calls.keys()
                group.operations |= {site.rpartition(":")[2] for site in old.calls}
    return plan


def follow_callers(twin: nn.Module, group: Group) -> None:
    """Turn modules that run edited code outside of their class's forward into edited modules too.

    Code in another method, in a hook or in a forward that was set on the instance is edited by the plan of
    the module around it, and may be called on its own, so it must be able to begin a pass.
    """
    functions = {site.partition(":")[0] for site in group.sites}
    classes = {name.rpartition(".")[0] for name in functions if not name.endswith(".forward")} - {""}
    for module in list(twin.modules()):
        hooks = forward_hooks(module)
        if (
            "forward" in module.__dict__
            or any(kind.__qualname__ in classes for kind in type(module).__mro__)
            or any(_qualified_name(hook) in functions for hook in hooks)
        ):
            follow(module, group)


def _qualified_name(function: Any) -> str:
    """The qualified name of the function that runs when ``function`` is called."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        function = type(function).__call__
    return getattr(function, "__qualname__", "")


@functools.cache
def _edited_class(original: type[nn.Module]) -> type[nn.Module]:
    forward = _forward_of(original)
    namespace = {
        **{name: _within_pass(name, method) for name, method in _own_methods(original)},
        **_copies_of(original),
        **_refusals_of(original),
        "forward": functools.wraps(original.forward)(forward),
        "__call__": _call_of(original, forward),
        "__prepare_scriptable__": _refuse_script,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    make: Any = type(original)
    return make(original.__name__, (original,), namespace)


def _forward_of(original: type[nn.Module]) -> Any:
    """The forward of an edited class, which begins an edited pass or joins the current pass."""
    plain = eager(original.forward)
    is_compiled = plain is not original.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__.get(_FORWARD)
        if getattr(own, "__func__", None) is forward:
            raise SkipscopeError(
                operation_of(self),
                "the twin lost the forward that was set on its original: pickle knows a method by its name"
                " only",
                got=type(self).__name__,
                cure="give the method to the model's class, or edit the model after loading it",
            )
        # Look the forward up at each call: a graph module's class gets a new forward when its graph changes.
        plainly = functools.partial(plain if is_compiled else original.forward, self)
        run = plainly if own is None else own  # not `own or plainly`: torch 2.6 cannot compile bool(partial)
        plan = plan_of(self)
        # Another instance, created from the twin's class, has no plan.
        if plan is None:
            return run(*args, **kwargs)
        this = plan.group.compiled if torch.compiler.is_compiling() else _eager_pass.pass_of(plan)
        if this is not None:
            for join in plan.reads:
                args, kwargs = join.given(args, kwargs, this)
        if torch.compiler.is_compiling():
            return _compiled_pass.run_forward(self, plan, run, args, kwargs)
        _refuse_symbolic(self, (args, kwargs))
        return _eager_pass.run_module(self, plan, run, args, kwargs)

    return forward


def _call_of(original: type[nn.Module], forward: Any) -> Any:
    """The ``__call__`` of an edited class. Hooks may merge too, so the pass begins before them."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, plan = functools.partial(original.__call__, self), plan_of(self)
        # Compiled code is edited in forward, and a tracer may treat the module as a leaf.
        edits_itself = torch.compiler.is_compiling() or self._compiled_call_impl is not None
        if plan is None or edits_itself or _is_symbolic((args, kwargs)):
            return run(*args, **kwargs)
        with _seen_into(self.__dict__.get("forward"), forward):
            return _eager_pass.run_module(self, plan, run, args, kwargs)

    return call


def _copies_of(original: type[nn.Module]) -> dict[str, Any]:
    """Methods for pickling, copying and recompiling, which recreate the class and keep the plan."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        inherited: Any = original.__reduce_ex__
        parts = inherited(self, protocol)
        assert isinstance(parts, tuple)
        arguments = tuple(original if argument is type(self) else argument for argument in parts[1])
        return (_rebuild, (parts[0], arguments, original), *parts[2:])

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        inherited: Any = original
        copied, plan = inherited.__deepcopy__(self, memo), plan_of(self)
        # The copy of a graph module has a new class and no plan.
        if plan is not None and plan_of(copied) is None:
            copied.__dict__[PLAN] = plan.__deepcopy__(memo)
            if not isinstance(copied, _edited_class(original)):
                copied.__class__ = _edited_class(type(copied))
        return copied

    def recompile(self: Any) -> Any:
        self.__class__ = original  # recompile sets the forward of the instance's class
        try:
            return self.recompile()
        finally:
            self.__class__ = _edited_class(original)

    return {
        "__reduce_ex__": reduce,
        **({"__deepcopy__": deepcopy} if hasattr(original, "__deepcopy__") else {}),
        **({"recompile": recompile} if issubclass(original, torch.fx.GraphModule) else {}),
    }


def _refusals_of(original: type[nn.Module]) -> dict[str, Any]:
    """Methods that refuse to change the original's parameters through a twin that shares them."""

    def apply(self: nn.Module, function: Any, *args: Any, **kwargs: Any) -> nn.Module:
        _refuse_if_shared(self, "move or convert the original first, or make the twin with share=False")
        return original._apply(self, function, *args, **kwargs)

    def load(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _refuse_if_shared(self, "load the original first, or make the twin with share=False")
        return original.load_state_dict(self, *args, **kwargs)

    def require(self: nn.Module, requires_grad: bool = True) -> nn.Module:
        _refuse_if_shared(self, "freeze the original first, or make the twin with share=False")
        return original.requires_grad_(self, requires_grad)

    return {"_apply": apply, "load_state_dict": load, "requires_grad_": require}


def _rebuild(make: Any, arguments: tuple[Any, ...], original: type[nn.Module]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _edited_class(original)
    return module


def _refuse_if_shared(module: nn.Module, cure: str) -> None:
    if shares_parameters(module):
        raise SkipscopeError(
            operation_of(module),
            "this twin shares its parameters with the original, which would be changed too",
            cure=cure,
        )


# --- other methods ---


def _own_methods(original: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the methods of a class that ``nn.Module`` does not have."""
    seen = set(dir(nn.Module))
    for kind in original.__mro__:
        if kind.__module__.partition(".")[0] in {"torch", "builtins"}:
            continue
        for name, method in vars(kind).items():
            # The body of a generator or coroutine runs after the call, outside of the pass.
            runs_later = inspect.isgeneratorfunction(method) or inspect.iscoroutinefunction(method)
            if name not in seen and isinstance(method, types.FunctionType) and not runs_later:
                yield name, method
            seen.add(name)


def _within_pass(name: str, method: Any) -> Any:
    plain = eager(method)

    @functools.wraps(method)
    def within_pass(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, plan = functools.partial(plain, self), plan_of(self)
        if plan is None:
            return run(*args, **kwargs)
        if torch.compiler.is_compiling():
            return _compiled_pass.run_method(plan, run, args, kwargs)
        return _eager_pass.run_module(self, plan, run, args, kwargs, method=name)

    return within_pass


# --- tracers ---


def _seen_into(own: Any, forward: Any) -> Any:
    """Context in which a compiled forward set on a twin runs eagerly, unless it is the edited forward."""
    inside = None if own is None else eager(own)
    if inside is own or getattr(inside, "__func__", None) is forward:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _is_symbolic(value: Any) -> bool:
    """Whether arguments contain a proxy of ``torch.fx.symbolic_trace``."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_symbolic, value))
    if isinstance(value, dict):
        return any(map(_is_symbolic, value.values()))
    return isinstance(value, torch.fx.Proxy)


def _refuse_symbolic(self: nn.Module, arguments: Any) -> None:
    if _is_symbolic(arguments):
        raise SkipscopeError(
            operation_of(self),
            "torch.fx.symbolic_trace runs an edited twin on symbols, and would give the network as built",
            got="torch.fx.Proxy",
            cure=(
                "torch.export.export(twin, (inputs,)).module(), torch.compile(twin) and "
                "torch.jit.trace(twin, inputs) keep the edits"
            ),
        )


def _refuse_script(self: nn.Module) -> nn.Module:
    raise SkipscopeError(
        operation_of(self),
        "torch.jit.script reads an edited twin's source, and would give the network as built",
        got=type(self).__name__,
        cure="torch.jit.trace(twin, inputs) and torch.export.export(twin, (inputs,)) keep the edits",
    )
