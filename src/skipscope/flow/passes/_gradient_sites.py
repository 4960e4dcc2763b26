"""Gradients at the outputs of weighted calls and pooling calls, in order of execution.

A *weighted call* is a linear layer, convolution, embedding lookup or recurrent cell whose weight is a
parameter, or is computed from parameters alone (transposed, normalised or cast). Its site is named after the
module with the parameter. Hooks read the gradient of its output; for a fused recurrent layer also that of its
input, by time step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._data import tensors_in
from skipscope.flow.passes._tensor_norms import dense, norm_of
from skipscope.shortcuts import Trace, TracedCall
from skipscope.shortcuts.trace import Recorder


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOOKUPS = _words("embedding embedding_bag getitem index_select gather")
FUSED = _words("lstm gru rnn_tanh rnn_relu")
WEIGHTED = (
    LOOKUPS
    | FUSED
    | _words(
        """
    linear matmul mm bmm addmm baddbmm addbmm mv einsum tensordot inner dot bilinear chain_matmul conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution lstm_cell gru_cell
    rnn_tanh_cell rnn_relu_cell _grouped_mm grouped_mm
    """
    )
)
# Averages and sums over positions, which change the gradient's norm only by the number of positions.
_POOLS = _words(
    """mean sum nansum avg_pool avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d"""
)
_LOOKED_AT = WEIGHTED | _POOLS | {"div", "mul"}
_JOINS = _words("stack cat hstack vstack dstack")
# Attention over a single position gives it all the weight, whatever the queries and keys are.
_ATTENTIONS = _words("softmax scaled_dot_product_attention")
# Functions that may give a term of the loss no gradient on a batch.
_CLAMPS = _words(
    "clamp clamp_min clamp_max relu maximum minimum max min amax amin where hinge_embedding_loss "
    "margin_ranking_loss triplet_margin_loss multi_margin_loss cosine_embedding_loss"
)


@dataclass
class SiteReading:
    """Gradient at a site over all batches.

    Attributes:
        name: name of the module with the weight.
        function: function of the call.
        weights: names of its parameters.
        step: number of earlier calls with the same weights.
        order: index of the call in the trace of the first batch; -1 if it was not called there.
        trained: whether any of the parameters requires a gradient.
        squares: squared norm of the gradient, summed over batches in units of the loss.
        elements: number of elements of the gradient.
        finite: whether all its elements are finite.
        seen: whether any gradient arrived.
        steps: squared norms of dL/d(input) of a fused recurrent layer, by time step.
        step_elements: numbers of elements of these gradients.
    """

    name: str
    function: str
    weights: tuple[str, ...]
    step: int
    order: int
    trained: bool
    squares: float = 0.0
    elements: int = 0
    finite: bool = True
    seen: bool = False
    steps: list[float] = field(default_factory=list)
    step_elements: list[int] = field(default_factory=list)

    def add(self, gradient: Tensor, unit: float) -> None:
        """Add a gradient."""
        gradient = dense(gradient.detach())
        norm = norm_of(gradient) if gradient.numel() else 0.0
        self.seen, self.finite = True, self.finite and math.isfinite(norm)
        self.elements += gradient.numel()
        self.squares = math.hypot(math.sqrt(self.squares), norm * unit) ** 2

    def add_steps(self, rows: list[Tensor], unit: float) -> None:
        """Add dL/d(input), by time step."""
        self._extend(len(rows))
        for t, row in enumerate(rows):
            self.steps[t] += (norm_of(row) * unit) ** 2
            self.step_elements[t] += row.numel()

    def merge(self, other: SiteReading) -> None:
        """Add another batch's reading."""
        self.squares = math.hypot(self.norm, other.norm) ** 2
        self.elements += other.elements
        self.finite, self.seen = self.finite and other.finite, self.seen or other.seen
        self._extend(len(other.steps))
        for t, square in enumerate(other.steps):
            self.steps[t] += square
            self.step_elements[t] += other.step_elements[t]

    def _extend(self, length: int) -> None:
        missing = [0] * (length - len(self.steps))
        self.steps += map(float, missing)
        self.step_elements += missing

    @property
    def norm(self) -> float:
        """L2 norm over the whole batch."""
        return math.sqrt(self.squares)


@dataclass
class PoolReading:
    """Gradient at the input and at the output of an average over positions.

    Attributes:
        order: index of the call.
        function: function of the call.
        positions: number of input elements per output element.
        into: norm of the gradient at the input.
        out: norm of the gradient at the output.
        measured: whether both norms are read; otherwise, without gradients, disjoint averages are assumed.
    """

    order: int
    function: str
    positions: float
    into: float = 0.0
    out: float = 0.0
    measured: bool = True

    @property
    def decades(self) -> float:
        """Decades that the norm of the gradient loses here; negative if it grows."""
        if not self.measured:
            # The backward pass of a sum over N makes N copies, whose norm is sqrt(N) times as large. A mean
            # has a further factor of 1/N.
            share = {"sum": -0.5, "nansum": -0.5, "mul": 1.0, "div": 1.0}.get(self.function, 0.5)
            return share * math.log10(self.positions)
        return math.log10(self.out / self.into) if self.into > 0 and self.out > 0 else 0.0


@dataclass
class CallGraph:
    """Graph of the calls of a trace, by index.

    Attributes:
        parents: for each call, the calls whose results it takes.
        results: calls that produce the loss.
        inputs: for each call, bits of the model's inputs upstream of it.
    """

    parents: list[tuple[int, ...]]
    results: tuple[int, ...]
    inputs: list[int]

    @classmethod
    def of(cls, trace: Trace, results: Iterable[int]) -> CallGraph:
        """Build the graph of a trace, with the given values as its results."""
        made = [value.call for value in trace.values]
        bits = [0] * len(trace.values)
        for i, value in enumerate(trace.inputs):
            bits[value] = 1 << min(i, 60)
        parents, inputs = [], []
        for call in trace.calls:
            parents.append(tuple({c for v in call.operands if (c := made[v]) is not None}))
            given = 0
            for value in call.operands:
                given |= bits[value]
            for value in call.results:
                bits[value] |= given
            inputs.append(given)
        ends = {c for v in results if (c := made[v]) is not None}
        return cls(parents, tuple(sorted(ends)), inputs)

    def place_of(self, trace: Trace, value: int) -> tuple[int, int]:
        """The call that gave a value, -1 for an input, and the inputs that it was computed from."""
        call = trace.values[value].call
        if call is not None:
            return call, self.inputs[call]
        return -1, 1 << min(trace.inputs.index(value), 60) if value in trace.inputs else 0

    def ancestors(self, calls: Iterable[int], without: int = -1) -> set[int]:
        """Every call upstream of ``calls``, including these, by paths that do not pass ``without``."""
        seen, waiting = set[int](), [call for call in calls if call != without]
        while waiting:
            call = waiting.pop()
            if call not in seen:
                seen.add(call)
                waiting += [parent for parent in self.parents[call] if parent != without]
        return seen

    def descendants(self, call: int) -> set[int]:
        """Every call that depends on ``call``, including itself."""
        found = {call}
        for later in range(call + 1, len(self.parents)):
            if not found.isdisjoint(self.parents[later]):
                found.add(later)
        return found

    def reached(self, without: int = -1) -> set[int]:
        """Every call that the loss depends on, by paths that do not pass ``without``."""
        return self.ancestors(self.results, without)


@dataclass(frozen=True)
class Term:
    """Term of the loss: a summand, or all summands that a line of code produces with the same weights.

    The steps of a recurrence are an example of the second case.

    Attributes:
        name: function and source line.
        values: the summands, as values of the trace.
        clamped: whether a call after the last weights may give the term no gradient on a batch.
    """

    name: str
    values: tuple[int, ...]
    clamped: bool


# Elementwise activation functions.
ACTIVATIONS = _words(
    """
    relu tanh sigmoid gelu silu mish elu selu celu leaky_relu softplus hardtanh hardsigmoid hardswish relu6
    softsign logsigmoid erf sin cos
    """
)
# Norms over the data.
_NORMS = _words("layer_norm batch_norm group_norm instance_norm rms_norm rsqrt normalize")
# Most weights per norm in a network with norms between the weights: a transformer block has two norms and six
# to eight weights.
WEIGHTS_PER_NORM = 6


class SiteReader:
    """Listener of a recorder that hooks the outputs of weighted calls and of pools.

    Args:
        model: model with the weights.
        measured: whether there will be gradients; otherwise only the calls are recorded.

    Attributes:
        sites, pools: readings of weighted calls and of pools.
        cuts: calls with an input that requires a gradient and an output that does not (``detach``, or any
            call under no_grad).
        hidden: outputs of opaque calls, one for each call.
        single: indices of the calls that produced queries and keys of attention over a single position.
        unit: factor from units of the pass to units of the loss; empty until the seed is known.
    """

    def __init__(self, model: nn.Module, measured: bool = True):
        self.measured = measured
        self.sites: list[SiteReading] = []
        self.pools: list[PoolReading] = []
        self.cuts: list[tuple[int, str]] = []
        self.single: list[int] = []
        self.unit: list[float] = []
        self._parameters = {
            n: (p.requires_grad, p.ndim) for n, p in model.named_parameters(remove_duplicate=False)
        }
        self.hidden: list[SiteReading] = []
        self._hidden_nodes: dict[Any, SiteReading] = {}
        self._hidden_seen: set[tuple[int, int]] = set()
        self._times: Counter[tuple[str, ...]] = Counter()
        self._scalars: dict[int, Tensor] = {}
        self.recorder: Recorder | None = None

    def __call__(self, call: TracedCall, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Record a call."""
        assert self.recorder is not None
        if self.recorder.trace.hidden and self.measured:
            self._look_for_hidden(self.recorder, args, kwargs)
        if call.index < 0:
            return
        if call.function in _ATTENTIONS and _is_single(call, args, kwargs):
            asked = tensors_in((args, kwargs))[: 1 if call.function == "softmax" else 2]
            made = (self.recorder.trace.values[self.recorder.value_of(t)].call for t in asked)
            self.single += [one for one in made if one is not None]
        passes_on = isinstance(output, Tensor) and output.requires_grad
        if passes_on and not call.in_place and call.function not in _LOOKED_AT and output.numel() > 1:
            return  # most calls: no site, no pool, no term, and the gradient goes through
        results = [args[0]] if call.in_place and args else tensors_in(output)
        trace = self.recorder.trace
        if not results or not all(isinstance(r, Tensor) for r in results):
            return
        if not any(trace.values[v].from_data for v in call.operands):
            return
        if passes_on and output.numel() == 1 and call.results:
            self._scalars[call.results[0]] = output
        floats = [r for r in results if r.is_floating_point() or r.is_complex()]
        if floats and not any(r.requires_grad for r in floats):
            given = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
            if any(not isinstance(t, nn.Parameter) for t in given):
                self.cuts.append((call.index, call.function))
        names = trace.weights_of(call) if call.function in WEIGHTED else frozenset()
        known = {n: self._parameters[n] for n in names if n in self._parameters}
        if max((ndim for _, ndim in known.values()), default=0) >= 2:
            self._site(call, known, floats, args)
        elif call.function in _POOLS and isinstance(args[0], Tensor):
            self._pool(trace, call, args[0], results[0], args[0].numel() / max(1, results[0].numel()))
        elif (
            call.function in {"div", "mul"}
            and isinstance(args[0], Tensor)
            and (n := self._summed(trace, call))
        ):
            self._pool(trace, call, args[0], results[0], n)

    def _look_for_hidden(self, recorder: Recorder, args: Any, kwargs: Any) -> None:
        """Hook outputs of an ``autograd.Function``, which are recognised when another call takes them."""
        for tensor in tensors_in((args, kwargs)):
            node = tensor.grad_fn
            if not isinstance(node, torch.autograd.function.BackwardCFunction):
                continue
            key = (id(node), tensor.output_nr)
            name = type(node).__name__.removesuffix("Backward")
            if key in self._hidden_seen or not any(h.name == name for h in recorder.trace.hidden):
                continue
            self._hidden_seen.add(key)
            if node not in self._hidden_nodes:
                self._hidden_nodes[node] = self._hidden_site(recorder, name, tensor)
            tensor.register_hook(self._hook(self._hidden_nodes[node].add))

    def _hidden_site(self, recorder: Recorder, name: str, tensor: Tensor) -> SiteReading:
        made = recorder.trace.values[recorder.value_of(tensor)].call
        weights = () if made is None else recorder.trace.weights_of(recorder.trace.calls[made])
        known = {n: self._parameters[n] for n in weights if n in self._parameters}
        matrices = tuple(sorted(n for n, (_, ndim) in known.items() if ndim >= 2))
        nth = sum(site.function == name for site in self.hidden)
        order = -1 if made is None else made
        site = SiteReading(f"{name} {nth + 1}", name, matrices, nth, order, True)
        self.hidden.append(site)
        return site

    def _summed(self, trace: Trace, call: TracedCall) -> float:
        """Number of summed positions if an operand is a sum (times a constant it is an average), else 0."""
        last = self.pools[-1] if self.pools else None
        if last is None or last.function != "sum":
            return 0.0
        return last.positions if any(trace.values[v].call == last.order for v in call.operands) else 0.0

    def _site(
        self, call: TracedCall, known: dict[str, tuple[bool, int]], results: list[Tensor], args: Any
    ) -> None:
        names = tuple(sorted(n for n, (_, ndim) in known.items() if ndim >= 2))
        owner = names[0].rpartition(".")[0] or names[0]
        site = SiteReading(
            owner, call.function, names, self._times[names], call.index, any(known[n][0] for n in names)
        )
        self._times[names] += 1
        self.sites.append(site)
        for result in results:
            if result.requires_grad:
                result.register_hook(self._hook(site.add))
        if call.function in FUSED and isinstance(args[0], Tensor) and args[0].requires_grad:
            packed = (
                args[1]
                if len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
                else None
            )
            sizes = None if packed is None else packed.tolist()
            batch_first = sizes is None and bool(args[-1])
            args[0].register_hook(self._hook(lambda g, u: site.add_steps(by_step(g, sizes, batch_first), u)))

    def _pool(self, trace: Trace, call: TracedCall, taken: Tensor, given: Tensor, positions: float) -> None:
        if given.numel() <= 1 or taken.ndim <= 1 or positions <= 1 or _is_joined(trace, call.index):
            return
        pool = PoolReading(call.index, call.function, positions, measured=self.measured)
        if not self.measured:
            self.pools.append(pool)
            return
        if not (given.requires_grad and taken.requires_grad):
            return
        self.pools.append(pool)
        taken.register_hook(self._hook(lambda g, u: _raise(pool, "into", g, u)))
        given.register_hook(self._hook(lambda g, u: _raise(pool, "out", g, u)))

    def _hook(self, add: Callable[[Tensor, float], None]) -> Callable[[Tensor | None], None]:
        # The hook must not refer to self: autograd's nodes keep hooks alive, and cycles through them leak.
        unit = self.unit

        def read(gradient: Tensor | None) -> None:
            # Hooks also run while the seed is being computed.
            if unit and gradient is not None:
                add(gradient, unit[0])

        return read

    def terms(self, value: Tensor) -> list[tuple[Term, list[Tensor]]]:
        """The terms of the loss with their tensors, in order of execution; empty if there is only one."""
        assert self.recorder is not None
        trace = self.recorder.trace
        summands = [v for v in trace.addends(self.recorder.value_of(value)) if trace.values[v].from_data]
        tensors = {v: self._scalars[v] for v in dict.fromkeys(summands) if v in self._scalars}
        if len(tensors) < 2 or len(tensors) < len(set(summands)):
            return []
        groups: dict[Any, list[int]] = {}
        made = {}
        for v in sorted(tensors):
            call = made[v] = trace.calls[trace.values[v].call or 0]
            above = trace.ancestors(v)
            weights = frozenset(i for i in trace.parameters.values() if i in above)
            groups.setdefault((call.site, call.function, weights), []).append(v)
        if len(groups) < 2:
            return []
        names: Counter[str] = Counter()
        found = []
        for values in groups.values():
            call = made[values[0]]
            name = f"{call.function} at {call.source}" if call.source else call.function
            names[name] += 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            found.append(
                (Term(name, tuple(values), self._clamped(trace, values)), [tensors[v] for v in values])
            )
        return found

    def is_normed(self, trace: Trace) -> bool:
        """Whether there are norms over the data between the weights, not counting batch norm in eval mode."""
        norms = sum(
            call.function in _NORMS
            and not (call.function == "batch_norm" and not call.argument(5, "training", True))
            for call in trace.calls
        )
        return 0 < len(self.sites) <= WEIGHTS_PER_NORM * norms

    def is_squashed(self, trace: Trace, reached: set[int]) -> bool:
        """Whether an activation function follows the last weights."""
        last = max((site.order for site in self.sites if site.order in reached), default=len(trace.calls))
        squashing = ACTIVATIONS | {"softmax"}
        return any(call.function in squashing and call.index in reached for call in trace.calls[last + 1 :])

    def forget(self) -> None:
        """Release the recorder and tensors."""
        self.recorder = None
        self._scalars.clear()
        self._hidden_nodes.clear()

    def _clamped(self, trace: Trace, values: list[int]) -> bool:
        above = {trace.values[v].call for value in values for v in trace.ancestors(value)} - {None}
        last = max((site.order for site in self.sites if site.order in above), default=-1)
        return any(
            call is not None and call > last and trace.calls[call].function in _CLAMPS for call in above
        )


def _is_single(call: TracedCall, args: Any, kwargs: Any) -> bool:
    """Whether a softmax is over a single entry, or an attention has a single key."""
    tensors = tensors_in((args, kwargs))
    if call.function != "softmax":
        return len(tensors) > 1 and tensors[1].shape[-2] == 1
    dim = call.argument(1, "dim")
    return isinstance(dim, int) and tensors[0].ndim > 0 and tensors[0].shape[dim] == 1


def _raise(pool: PoolReading, name: str, gradient: Tensor, unit: float) -> None:
    setattr(pool, name, math.hypot(getattr(pool, name), norm_of(dense(gradient.detach())) * unit))


def _is_joined(trace: Trace, call: int, steps: int = 4) -> bool:
    """Whether the input of a call was concatenated just before: a sum over it is a merge, not an average."""
    for value in trace.calls[call].operands:
        parent = trace.values[value].call
        if parent is not None and (
            trace.calls[parent].function in _JOINS or (steps and _is_joined(trace, parent, steps - 1))
        ):
            return True
    return False


def by_step(gradient: Tensor, sizes: list[int] | None, batch_first: bool) -> list[Tensor]:
    """Split a gradient of shape ``[T, B, F]``, ``[B, T, F]`` or ``[T, F]``, or packed rows, by time step."""
    value = gradient.detach()
    if sizes is not None:
        return list(value.split(sizes))
    return list(value.transpose(0, 1) if value.ndim == 3 and batch_first else value)
