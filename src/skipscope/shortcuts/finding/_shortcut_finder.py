"""``find_shortcuts``: the shortcuts of any eager model, read from the trace of one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from skipscope import _data
from skipscope._public_call import public_call
from skipscope._sharding import class_name, refuse_flattened
from skipscope._untouched import untouched
from skipscope.shortcuts._model_wrappers import unwrapped
from skipscope.shortcuts._shortcut_result import Kind, Layer, OperandSide, Rejected, Shortcut, Shortcuts
from skipscope.shortcuts.finding._bit_sets import bits
from skipscope.shortcuts.finding._boundaries import boundaries_of
from skipscope.shortcuts.finding._candidate import Candidate, Reason
from skipscope.shortcuts.finding._graph import Graph
from skipscope.shortcuts.finding._judge import Judge
from skipscope.shortcuts.finding._merge import Merge
from skipscope.shortcuts.finding._names import fork_name, home_of, merge_name, unique_names
from skipscope.shortcuts.finding._streams import learned_streams
from skipscope.shortcuts.trace import LentInputs, Trace, record


@public_call("find_shortcuts")
def find_shortcuts(model: nn.Module, inputs: Any) -> Shortcuts:
    """Find and name every shortcut in one forward pass.

    Local, under DDP too. Collective where the forward pass is (FSDP2, tensor parallel): every rank must call
    it, and each finds the shortcuts of the unsharded model.

    Args:
        model: any eager module, left unchanged; of a compiled or DDP-wrapped model, the eager module inside
            is run.
        inputs: its inputs: a tensor, a tuple (positional) or a Mapping (keywords).

    Returns:
        The shortcuts in order of execution; ``.rejected`` has every other merge with its reason.

    Raises:
        SkipscopeError: the model cannot be run on these inputs; its parameters are flattened (FSDP1); or it
            is sharded, and a rank has not called within a minute.

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
    with untouched(model, seed=0, operation="find_shortcuts"):
        model = unwrapped(model)
        return read(traced(model, inputs), model)


def traced(model: nn.Module, inputs: Any) -> Trace:
    """Trace one forward pass, on the meta device if the model is there; the inputs stay unchanged."""
    lent = LentInputs()
    on_meta = any(parameter.is_meta for parameter in model.parameters())

    def forward() -> Any:
        given = _data.map_tensors(inputs, lambda t: t.detach().to("meta")) if on_meta else lent.lend(inputs)
        return _data.forward(model, (given, None), "find_shortcuts")

    return record(model, forward, lent)


def read(trace: Trace, model: nn.Module, streams: Mapping[int, str] | None = None) -> Shortcuts:
    """Read the shortcuts from a trace."""
    graph = Graph(trace, model, streams)
    judge = Judge(graph)
    verdicts = [(call, judge.verdict(call)) for call in graph.merges]
    if streams is None and (begun := learned_streams(graph, verdicts)):
        return read(trace, model, begun)
    parts = {id(part) for _, v in verdicts if isinstance(v, Candidate) for part in v.parts}
    found = _with_addends(judge, [(c, v) for c, v in verdicts if id(c) not in parts])
    runs_at: dict[int | None, list[int]] = {}
    for i, run in enumerate(graph.runs):
        runs_at.setdefault(graph.node_of(run.outputs[0]) if run.outputs else None, []).append(i)
    homes = [home_of(graph, item) for item in found]
    names = unique_names(graph, found, homes)
    merges = {item.call.output: name for item, name in zip(found, names, strict=True)}
    for item, name in zip(found, names, strict=True):
        if item.mixture is not None:
            merges[item.mixture.end] = name
    return Shortcuts(
        entries=tuple(
            _entry(graph, item, name, merges, runs_at) for item, name in zip(found, names, strict=True)
        ),
        rejected=(*_rejected(verdicts, found, parts), *_joined_otherwise(graph)),
        boundaries=boundaries_of(graph, model, list(zip(found, names, homes, strict=True))),
        layers=_layers(graph, model),
        opaque=_opaque(graph, model),
        model=class_name(model),
        not_run=_not_run(trace, model),
        passed=_passed(graph, judge, verdicts, runs_at, merges),
        writes_inputs=trace.writes_inputs,
        weights_used=_weights_used(trace),
    )


def _opaque(graph: Graph, model: nn.Module) -> tuple[Rejected, ...]:
    """The calls and inputs whose further use the trace cannot see."""
    return (
        *(Rejected(h.name, h.reason, h.source) for h in graph.trace.hidden),
        *_unseen_input(graph, model),
    )


def _unseen_input(graph: Graph, model: nn.Module) -> Iterator[Rejected]:
    """Yield the input if no recorded call leads from it to the output: ids read as Python numbers."""
    has_weights = any(True for _ in model.parameters())
    if has_weights and graph.trace.inputs and graph.trace.outputs and not graph.activations:
        yield Rejected("input", UNSEEN_INPUT, "")


def _not_run(trace: Trace, model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules with weights that did not run."""
    ran = {run.path for run in trace.runs} | {name.rpartition(".")[0] for name in trace.parameters}
    return tuple(path for path, module in model.named_modules() if module._parameters and path not in ran)


def _weights_used(trace: Trace) -> tuple[str, ...]:
    """Paths of the modules that did not run although a weight of theirs was used, in order of use."""
    ran = {run.path for run in trace.runs}
    return tuple(
        dict.fromkeys(path for name in trace.parameters if (path := name.rpartition(".")[0]) not in ran)
    )


def _passed(
    graph: Graph,
    judge: Judge,
    verdicts: Sequence[tuple[Merge, Candidate | Reason | None]],
    runs_at: Mapping[int | None, list[int]],
    merges: Mapping[int | None, str],
) -> tuple[Shortcut, ...]:
    """The decoder skips that pass a block with weights."""
    judged = [judge.passed(call) for call, verdict in verdicts if isinstance(verdict, Reason)]
    items = [item for item in judged if item is not None]
    names = unique_names(graph, items, [f"{item.call.owner}.passed".lstrip(".") for item in items])
    return tuple(_entry(graph, item, name, merges, runs_at) for item, name in zip(items, names, strict=True))


def _rejected(
    verdicts: Sequence[tuple[Merge, Candidate | Reason | None]], found: Sequence[Candidate], parts: set[int]
) -> tuple[Rejected, ...]:
    """The merges that are not in ``found``, each with its reason."""
    merging, others, seen = {id(item.call) for item in found}, [], set()
    for call, verdict in verdicts:
        if verdict is None or id(call) in merging:
            continue
        # A loop that writes the outputs of its steps into one tensor is one merge.
        if call.put is not None and call.traced.site in seen:
            continue
        seen.add(call.traced.site)
        # A candidate that is not in found was added to the branch of an earlier shortcut.
        reason = Reason.PARALLEL if isinstance(verdict, Candidate) else verdict
        reason = Reason.PART_OF_A_GATE if id(call) in parts else reason
        others.append(Rejected(merge_name(call), reason.value, call.source))
    return tuple(others)


UNSEEN_INPUT = "no recorded torch call leads from it to the output, so its use cannot be seen"
_NO_SUMS = frozenset(
    {
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "logaddexp",
        "logaddexp2",
        "hypot",
        "atan2",
        "pow",
        "copysign",
        "index_reduce",
        "scatter_reduce",
        "put",
    }
)


def _joined_otherwise(graph: Graph) -> Iterator[Rejected]:
    """Yield the calls that join activations by an operation other than a sum."""
    for call in graph.trace.calls if graph.activations else ():
        nodes = (
            [graph.node_of(v) for v in call.operands] if call.function in _NO_SUMS and not call.joins else []
        )
        if sum(bool(graph.bit(node)) for node in nodes) > 1:
            yield Rejected(f"{call.module} {call.function}".strip(), Reason.NO_SUM.value, call.source)


def _with_addends(
    judge: Judge, verdicts: Sequence[tuple[Merge, Candidate | Reason | None]]
) -> list[Candidate]:
    """The shortcuts, each with later addends computed from the same x included in its branch."""
    found: list[Candidate] = []
    last: dict[int, int] = {}  # node of a sum -> index of its shortcut in found

    def sum_at(node: int) -> Candidate | None:
        return found[last[node]] if node in last else None

    for call, verdict in verdicts:
        # An update of another part of a sum may share the branch of the first update, and then looks like a
        # shortcut of its own.
        may_add = verdict is Reason.PARALLEL or (verdict is not None and call.whole is not None)
        if may_add and (more := judge.gates.with_addend(call, sum_at)) is not None:
            which = last[more[0]]
            found[which] = more[1]
        elif isinstance(verdict, Candidate):
            which = len(found)
            found.append(verdict)
        else:
            continue
        last |= {node: which for node in (call.output, call.written) if node is not None}
    return found


def _layers(graph: Graph, model: nn.Module) -> tuple[Layer, ...]:
    modules = dict(model.named_modules())

    @functools.cache
    def size(path: str) -> int:
        return sum(p.numel() for p in modules[path]._parameters.values() if p is not None)

    return tuple(Layer(run.path, class_name(modules[run.path]), size(run.path)) for run in graph.runs)


def _entry(
    graph: Graph,
    item: Candidate,
    name: str,
    merges: Mapping[int | None, str],
    runs_at: Mapping[int | None, list[int]],
) -> Shortcut:
    branch = graph.modules_in(item.region)
    runs = sorted(i for v in bits(item.region) for i in runs_at.get(v, ()))
    runs = runs or [i for i, run in enumerate(graph.runs) if run.path in branch] or [0]
    tensors = [i for i, is_tensor in enumerate(item.call.tensors) if is_tensor]
    return Shortcut(
        name=name,
        kind=cast(Kind, item.kind),
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


def _side(item: Candidate, i: int) -> OperandSide:
    return "both" if i in item.both else "shortcut" if i in item.shortcut_operands else "branch"


def _blocked(item: Candidate) -> str | None:
    if item.call.traced.checkpointed:
        return (
            "checkpointing runs its code again outside of any module's forward: checkpoint whole modules"
            " instead"
        )
    if item.mixture is not None and not item.mixture.alone:
        return "the stack has another use besides the sum, such as its weights: write w * x + v * F"
    return None
