"""Find the shortcuts of any eager model by one forward pass: no symbolic tracing, nothing declared, nothing left."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from skipscope._sharding import class_name, refuse_flattened
from skipscope._untouched import untouched
from skipscope.shortcuts._bits import bits
from skipscope.shortcuts._boundaries import boundaries_of
from skipscope.shortcuts._graph import Graph
from skipscope.shortcuts._judge import Judge
from skipscope.shortcuts._names import fork_name, home_of, merge_name, unique_names
from skipscope.shortcuts._record import Call, Trace
from skipscope.shortcuts._results import Layer, Rejected, Shortcut, Shortcuts
from skipscope.shortcuts._streams import learned_streams
from skipscope.shortcuts._trace import trace
from skipscope.shortcuts._unwrap import unwrapped
from skipscope.shortcuts._verdict import PARALLEL, Verdict


def find_shortcuts(model: nn.Module, inputs: Any) -> Shortcuts:
    """Find and name every shortcut in one forward pass.

    Local, under DDP too. Collective where the forward pass is (FSDP2, tensor parallel): every rank calls it, and each
    finds what the unsharded model has.

    Args:
        model: any eager module (a compiled or DDP-wrapped one is run as the eager module inside); left as found.
        inputs: what it is called with: a tensor, a tuple (positional) or a Mapping (keywords).

    Returns:
        The shortcuts in order of execution; ``.rejected`` has every other merge with its reason.

    Raises:
        SkipscopeError: the model or its inputs cannot be run; its parameters are flattened (FSDP1); or it is sharded,
            and a rank has not called within a minute.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lin = nn.Linear(3, 3)
        ...     def forward(self, x):
        ...         return x + self.lin(x).relu()
        >>> found = find_shortcuts(nn.Sequential(Block(), Block()), torch.ones(2, 3))
        >>> [(s.name, s.kind, s.fork) for s in found]
        [('0', 'identity', 'input'), ('1', 'identity', '0')]
    """
    refuse_flattened(model, "find_shortcuts")
    with _collector_paused(), untouched(model, seed=0, operation="find_shortcuts"):
        graph = Graph(trace(unwrapped(model), inputs))
        try:
            return read(graph)
        finally:
            graph.release()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's collector would go through the graph of a long network again and again as it is built."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read(graph: Graph) -> Shortcuts:
    """The shortcuts in the graph of a trace."""
    record, judge = graph.record, Judge(graph)
    verdicts = [(call, judge.verdict(call)) for call in record.calls]
    if not record.streams:
        record.streams = learned_streams(graph, verdicts)
        if record.streams:
            again = Graph(record)
            try:
                return read(again)
            finally:
                again.release()
    parts = {id(part) for _, v in verdicts if isinstance(v, Verdict) for part in v.parts}
    found = _with_addends(graph, judge, [(c, v) for c, v in verdicts if id(c) not in parts])
    runs_at: dict[Any, list[int]] = {}
    for i, run in enumerate(record.runs):
        runs_at.setdefault(graph.position.get(run.node), []).append(i)
    homes = [home_of(graph, item) for item in found]
    names = unique_names(graph, found, homes)
    merges = {id(item.call.output): name for item, name in zip(found, names, strict=True)}
    for item, name in zip(found, names, strict=True):
        if item.mixture is not None:
            merges[id(graph.nodes[item.mixture.end])] = name
    return Shortcuts(
        entries=tuple(
            _entry(graph, item, name, merges, runs_at) for item, name in zip(found, names, strict=True)
        ),
        rejected=_rejected(verdicts, found, parts),
        boundaries=boundaries_of(graph, list(zip(found, names, homes, strict=True))),
        layers=_layers(record),
        opaque=tuple(Rejected(*item) for item in graph.opaque()),
        model=class_name(record.model),
    )


def _rejected(
    verdicts: Sequence[tuple[Call, Verdict | str | None]], found: Sequence[Verdict], parts: set[int]
) -> tuple[Rejected, ...]:
    """The merges that are none of ``found``, each with its reason."""
    merging, others = {id(item.call) for item in found}, []
    for call, verdict in verdicts:
        if verdict is None or id(call) in merging:
            continue
        # A verdict that came to nothing: its branch is one more of the shortcut before it.
        reason = PARALLEL if isinstance(verdict, Verdict) else verdict
        reason = "part of a gate" if id(call) in parts else reason
        others.append(Rejected(merge_name(call), reason, call.source))
    return tuple(others)


def _with_addends(
    graph: Graph, judge: Judge, verdicts: Sequence[tuple[Call, Verdict | str | None]]
) -> list[Verdict]:
    """The shortcuts; what is added to the sum of one later, and made from the same x, is of its branch."""
    found: list[Verdict] = []
    last: dict[int, int] = {}  # by the node of a sum, its shortcut

    def sum_at(node: int) -> Verdict | None:
        return found[last[node]] if node in last else None

    for call, verdict in verdicts:
        # What updates another part of a sum may share its branch with the first, and then looks like a shortcut of its own.
        may_add = verdict == PARALLEL or (verdict is not None and call.whole is not None)
        if may_add and (more := judge.gates.with_addend(call, sum_at)) is not None:
            which = last[more[0]]
            found[which] = more[1]
        elif isinstance(verdict, Verdict):
            which = len(found)
            found.append(verdict)
        else:
            continue
        last |= {graph.position[node]: which for node in (call.output, call.written) if node is not None}
    return found


def _layers(record: Trace) -> tuple[Layer, ...]:
    modules = record.modules

    @functools.cache
    def size(path: str) -> int:
        return sum(p.numel() for p in modules[path]._parameters.values() if p is not None)

    return tuple(Layer(run.path, class_name(modules[run.path]), size(run.path)) for run in record.runs)


def _entry(
    graph: Graph, item: Verdict, name: str, merges: dict[int, str], runs_at: dict[Any, list[int]]
) -> Shortcut:
    branch = graph.modules_in(item.region)
    runs = sorted(i for v in bits(item.region) for i in runs_at.get(v, ()))
    runs = runs or [i for i, run in enumerate(graph.record.runs) if run.path in branch] or [0]
    tensors = [i for i, is_tensor in enumerate(item.call.tensors) if is_tensor]
    return Shortcut(
        name=name,
        kind=item.kind,
        fork=fork_name(graph, item.forks[0], merges),
        merge=merge_name(item.call),
        branch=tuple(branch),
        shortcut=tuple(graph.modules_in(item.side_region)),
        source=item.call.source,
        span=(runs[0], runs[-1]),
        sides=tuple(_side(item, i) for i in tensors),
        key=item.call.key,
        shortcut_at=item.shortcut_at,
        branch_at=item.branch_at,
        blocked=_blocked(item),
        summed=item.is_summed,
    )


def _side(item: Verdict, i: int) -> str:
    return "both" if i in item.both else "shortcut" if i in item.shortcut_operands else "branch"


def _blocked(item: Verdict) -> str | None:
    if item.call.checkpointed:
        return "checkpointing runs its code again outside of any module's forward: checkpoint whole modules instead"
    if item.mixture is not None and not item.mixture.alone:
        return "what it stacks makes something else too, such as the weights of the sum: write w * x + v * F"
    return None
