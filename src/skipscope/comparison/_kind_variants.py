"""Twins by kind of connection: the network with its shortcuts replaced by each kind in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from skipscope._errors import SkipscopeError
from skipscope._option_words import ConnectionKind
from skipscope._subject import Subject
from skipscope.nn import find_kind
from skipscope.shortcuts import add_shortcuts, rewirable, rewire


def kind_names(variants: Any) -> tuple[ConnectionKind, ...]:
    """The kinds that ``variants`` names; empty if it maps names to networks.

    Raises:
        SkipscopeError: an unknown kind, or an entry that is not a string.
    """
    names: list[Any] = [variants] if isinstance(variants, str) else list(variants or ())
    if isinstance(variants, Mapping):
        return ()
    for name in names:
        if not isinstance(name, str):
            raise SkipscopeError(
                "compare",
                "variants are kinds of shortcut, or networks by name",
                got=type(name).__name__,
                expected='["rezero", "highway"], or {"wide": make_wide}',
                cure="skipscope.nn.registry() lists the kinds",
            )
        find_kind(name, "compare")
    return tuple(dict.fromkeys(names))


def twins_by_kind(
    names: Sequence[ConnectionKind], subject: Subject, again: Callable[[], nn.Module] | None, notes: list[str]
) -> dict[str, tuple[nn.Module, Any]]:
    """Build a twin and its maker for each kind; kinds that do not fit are named in ``notes``.

    If the network has shortcuts that are sums of two operands, they are rewired; otherwise shortcuts of the
    kind are added.

    Raises:
        SkipscopeError: none of the kinds fits.
    """
    sums = rewirable(subject.found)
    if names and len(sums) < len(subject.found):
        notes.append(
            f"{len(sums)} of {len(subject.found)} shortcuts are sums of two operands; only these are replaced"
        )
    twins: dict[str, tuple[nn.Module, Any]] = {}
    refused: dict[str, SkipscopeError] = {}
    for name in names:
        if len(sums):
            make = partial(rewire, found=sums, kind=name, inputs=subject.inputs)
        else:
            make = partial(add_shortcuts, inputs=subject.inputs, kind=name, report=None)
        try:
            twin = make(subject.model)
        except SkipscopeError as error:
            refused[name] = error
            continue
        twins[name] = twin, twin if again is None else partial(_apply_to_new, make, again)
    for name, error in refused.items():
        notes.append(f"{name} was left out: {error.problem} ({error.got})")
    if refused and not twins:
        raise next(iter(refused.values()))
    return twins


def _apply_to_new(make: Callable[[nn.Module], nn.Module], again: Callable[[], nn.Module]) -> nn.Module:
    return make(again())
