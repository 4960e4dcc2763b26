"""Edited twins: a copy of a model whose shortcuts are removed, detached, lesioned or scaled.

Each operand that carries the shortcut (or the branch) is replaced by zeros, detached, or multiplied by a
strength. Otherwise the twin runs the model's own code; see the folder ``twin``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope._public_call import public_call
from skipscope._untouched import private_copy, require_module
from skipscope._validation import require_option
from skipscope.shortcuts._model_wrappers import unwrapped
from skipscope.shortcuts._shortcut_result import Boundary, Shortcut, Shortcuts
from skipscope.shortcuts.edits._recalibration import recalibrate as recalibrate_norms
from skipscope.shortcuts.finding._shortcut_finder import find_shortcuts
from skipscope.shortcuts.twin import Group, Rule, edits_of, follow, follow_callers, remembered_boundaries


@public_call("ablate")
def ablate(
    model: nn.Module,
    found: Shortcuts | Shortcut | Iterable[Shortcut] | None = None,
    how: Literal["remove", "detach", "lesion"] = "remove",
    *,
    strength: float | Tensor | None = None,
    inputs: Any = None,
    share: bool = False,
    recalibrate: Any = None,
    allow_empty: bool = False,
) -> nn.Module:
    """Return a twin of ``model`` with its shortcuts removed, detached or scaled, or its branches lesioned.

    The table in the documentation (What words mean) defines each edit. The twin is a module of the same class
    name with the same ``state_dict`` keys. It can be trained, copied, pickled, compiled and edited again.
    Edits multiply: strength 0.5 twice is 0.25. Local. Shard a twin after making it: FSDP2 cannot copy a
    sharded model. Weights of a removed part (a removed projection, a lesioned branch) get no gradient: DDP
    needs ``find_unused_parameters=True``.

    Args:
        model: any eager module, left unchanged; of a compiled or DDP-wrapped model, the module inside is
            copied.
        found: the shortcuts to edit: a ``Shortcuts`` (all of them), a single shortcut, or several. They may
            come from another instance of the model.
        how: ``"remove"`` the shortcut, ``"detach"`` it (backward only), or ``"lesion"`` the branch.
        strength: instead of ``how``, a factor on the shortcut: a number, or a tensor that may require
            gradients (1 is as built, 0 is removed).
        inputs: with ``found=None``, the inputs with which to find all shortcuts.
        share: share the Parameter objects with ``model`` instead of copying them, to measure without extra
            memory. Such a twin refuses ``.to()``, ``.half()``, ``load_state_dict`` and training.
        recalibrate: data to recalibrate batch-norm statistics with (see :func:`recalibrate`).
        allow_empty: if there is no shortcut to edit, return a copy instead of raising.

    Raises:
        SkipscopeError: neither ``found`` nor ``inputs`` is given, or there are no shortcuts; a shortcut
            cannot be edited; the shortcuts are those of another architecture; the model is sharded. Also when
            the twin runs other code than that in which its shortcuts were found, and when one of its methods
            merges activations in code that was not searched for shortcuts.

    Example:
        >>> import torch
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.lin(x)
        >>> model, x = Net(), torch.ones(1, 3)
        >>> torch.equal(ablate(model, inputs=x)(x), model.lin(x))
        True
    """
    require_module(model, "ablate")
    model = unwrapped(model)
    if strength is None:
        require_option("ablate", "edit", how, ("remove", "detach", "lesion"), "strength=")
    if strength is not None and not isinstance(strength, Real | Tensor):
        raise SkipscopeError(
            "ablate",
            "a strength is one factor for all",
            expected="a number or a tensor",
            got=repr(strength),
            cure="ablate once for each group of shortcuts: edits of edits compose",
        )
    if strength is not None and how != "remove":
        raise SkipscopeError(
            "ablate",
            "two edits at once",
            expected="how=, or strength= (a factor on the shortcut)",
            got=f"how={how!r} and strength=",
            cure="ablate the twin again: edits of edits compose",
        )
    chosen, every = choose_shortcuts(model, found, inputs, "ablate")
    if not chosen and not allow_empty:
        raise _nothing_to_edit(model, found)
    refuse_another_architecture(model, chosen if every is None else every, "ablate")
    twin = private_copy(model, "ablate", share=share)
    _edit(twin, model, chosen, every, how, strength, share)
    return twin if recalibrate is None else recalibrate_norms(twin, recalibrate)


def _edit(
    twin: nn.Module,
    model: nn.Module,
    chosen: Sequence[Shortcut],
    every: Shortcuts | None,
    how: str,
    strength: float | Tensor | None,
    share: bool,
) -> None:
    """Apply an edit to the shortcuts ``chosen`` of ``twin``, a copy of ``model``.

    ``every`` holds all shortcuts that were found with them, or is None if these are unknown.
    """
    points = remembered_boundaries(model) or (every.boundaries if every is not None else ())
    factor = strength if strength is not None else None if how == "detach" else 0.0
    group = Group(points, share, (*edits_of(model), _in_words(how, strength, len(chosen), points, every)))
    if every is not None:
        group.known = frozenset(item.source for item in (*every.entries, *every.rejected))
    group.root = follow(twin, group)
    modules = dict(twin.named_modules())
    for shortcut in chosen:
        if shortcut.blocked:
            raise SkipscopeError(
                "ablate", "this shortcut cannot be edited", layer=shortcut.name, got=shortcut.blocked
            )
        lesion = how == "lesion" and strength is None
        for place in shortcut.branch_at if lesion else shortcut.shortcut_at:
            follow(modules[place.call.host], group).add(Rule(place, factor, shortcut.name))
    follow_callers(twin, group)


@contextmanager
def one_edit(twin: nn.Module, model: nn.Module, found: Shortcuts, how: str) -> Iterator[None]:
    """Context in which ``twin``, a copy of ``model`` with shared parameters, is edited; undone at exit.

    So a sequence of edits needs only one copy. Neither module may be an edited twin already. Local.

    Args:
        twin: the copy.
        model: the original.
        found: the shortcuts to edit, some of those found on ``model``.
        how: as for :func:`ablate`.
    """
    before = [(module, type(module), dict(vars(module))) for module in twin.modules()]
    try:
        _edit(twin, model, *choose_shortcuts(model, found, None, "ablate"), how, None, True)
        yield
    finally:
        for module, kind, attributes in before:
            if type(module) is not kind:
                module.__class__ = kind
                vars(module).clear()
                vars(module).update(attributes)


def _in_words(
    how: str,
    strength: float | Tensor | None,
    count: int,
    points: tuple[Boundary, ...],
    every: Shortcuts | None,
) -> str:
    if isinstance(strength, Tensor):
        words = "strength learned" if getattr(strength, "requires_grad", False) else "strength set"
    elif strength is not None:
        words = f"strength {strength:g}"
    else:
        words = {"remove": "removed", "detach": "detached", "lesion": "lesioned"}[how]
    total = sum(point.kind == "merge" for point in points)
    words = words if count >= total else f"{words} ({count} of {total})"
    not_run = () if every is None else every.not_run
    return f"{words}, unknown in {len(not_run)} modules that did not run" if not_run else words


def meaning(model: nn.Module) -> str:
    """Describe the edits of a model in words, e.g. ``"removed"``; ``"as built"`` without edits (local)."""
    return ", ".join(edits_of(model)) or "as built"


def refuse_another_architecture(model: nn.Module, found: Sequence[Shortcut], operation: str) -> None:
    """Refuse shortcuts that were found on a model with other modules: another class, deeper or shallower.

    Raises:
        SkipscopeError: a module of the shortcuts is not in ``model``, or ``model`` has further blocks.
    """
    modules = dict(model.named_modules())

    def refuse(shortcut: str | None, expected: str, got: str) -> NoReturn:
        raise SkipscopeError(
            operation,
            "these shortcuts were found on another architecture than this model's",
            layer=shortcut,
            expected=expected,
            got=got,
            cure="find them again: ss.find_shortcuts(model, inputs)",
        )

    for shortcut in found:
        hosts = (place.call.host for place in (*shortcut.shortcut_at, *shortcut.branch_at))
        for path in (*hosts, *shortcut.branch, *shortcut.shortcut):
            if path not in modules:
                refuse(shortcut.name, f"a module {path}", f"{type(model).__name__} has none")
    if not isinstance(found, Shortcuts):
        return
    seen = {layer.name for layer in found.layers} | {*found.not_run, *found.weights_used}
    with_weights = {path for path, module in modules.items() if module._parameters}
    in_rows = set().union(*map(_in_any_row, seen & with_weights)) if seen else set()
    for path in sorted(with_weights - seen):
        # A further block in a row of blocks makes the model deeper; a module inserted elsewhere (an adapter)
        # does not.
        if _in_any_row(path) & in_rows:
            refuse(None, f"no module {path}", f"{type(model).__name__} has it")


def _in_any_row(path: str) -> set[str]:
    """The path with each of its numbers replaced by ``*`` in turn; blocks of one row give equal patterns."""
    parts = path.split(".")
    return {".".join([*parts[:i], "*", *parts[i + 1 :]]) for i, part in enumerate(parts) if part.isdigit()}


def _nothing_to_edit(model: nn.Module, found: Any) -> SkipscopeError:
    name = type(model).__name__
    return SkipscopeError(
        "ablate",
        "there is no shortcut to edit, so the twin would be the model as built",
        expected="at least one shortcut",
        got=f"an empty selection for {name}" if found is not None else f"none in {name}",
        cure="look at ss.find_shortcuts(model, inputs); allow_empty=True gives a copy",
    )


def choose_shortcuts(
    model: nn.Module, found: Any, inputs: Any, operation: str
) -> tuple[Sequence[Shortcut], Shortcuts | None]:
    """The shortcuts to edit, and all that were found with them, or None if those are unknown."""
    if found is None:
        if inputs is None:
            raise SkipscopeError(
                operation,
                "neither found= nor inputs= is given",
                expected="found= or inputs=",
                cure=f"{operation}(model, inputs=x) edits all of them",
            )
        found = find_shortcuts(model, inputs)
    if isinstance(found, Shortcuts):
        return found.entries, found
    chosen = [found] if isinstance(found, Shortcut) else list(found)
    for item in chosen:
        if not isinstance(item, Shortcut):
            raise SkipscopeError(
                operation,
                "this is not a shortcut",
                expected="what ss.find_shortcuts returned, or some of it",
                got=f"{type(item).__name__}: {item!r:.60}",
                cure='found.select(name="layer1.*")',
            )
    knows = inputs is None or remembered_boundaries(model) is not None
    return chosen, None if knows else find_shortcuts(model, inputs)


def boundaries(model: nn.Module, inputs: Any, *, found: Shortcuts | None = None) -> tuple[Boundary, ...]:
    """List a model's boundaries, where its gradient flow is read, in order of execution.

    They are the first float activation, each merge's output, and outputs of modules outside every branch.

    An edited twin returns its original's boundaries, so that the two can be compared point by point. Local,
    or collective, as :func:`find_shortcuts`.

    Args:
        model: any eager module.
        inputs: its inputs.
        found: its shortcuts, if already known.
    """
    known = remembered_boundaries(unwrapped(model))
    if known is None:
        known = (found or find_shortcuts(model, inputs)).boundaries
    return known
