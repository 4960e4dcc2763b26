"""Readings finer than boundaries: the output of every weighted call and every pooling, in order of execution.

A *weighted call* is a linear map, convolution, lookup or recurrent cell that takes a parameter, or something computed
from parameters alone (a transposed, normalised or cast weight). Its site is named after the module that holds the
parameter. Hooks read the gradient of its output; of a fused recurrent layer that of its input, step by step, too.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipscope._data import tensors_in
from skipscope.flow._readings import dense, norm_of


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WEIGHTED = _words(
    """linear matmul mm bmm addmm baddbmm addbmm mv einsum tensordot inner dot bilinear chain_matmul __matmul__ rmatmul
    __rmatmul__ conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution embedding
    embedding_bag getitem __getitem__ index_select gather lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _grouped_mm grouped_mm"""
)
LOOKUPS = _words("embedding embedding_bag getitem __getitem__ index_select gather")
FUSED = _words("lstm gru rnn_tanh rnn_relu")
# Averages over positions, and sums over them: both change the gradient's norm by geometry alone.
POOLS = _words(
    """mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d sum nansum
    __mean__ avg_pool"""
)
SCALINGS = _words("div __truediv__ true_divide mul __mul__ __rmul__ div_ mul_ __itruediv__ __imul__ truediv")
_JOINS = _words("stack cat concat concatenate hstack vstack dstack")
# They read no values and are asked for thousands of times.
_QUERIES = _words(
    """__get__ size dim numel is_floating_point is_complex stride is_contiguous data_ptr __len__ requires_grad_ type
    register_hook __hash__ __format__ __repr__ element_size get_device storage_offset"""
)


@dataclass
class SiteReading:
    """The gradient at one site over all batches.

    Attributes:
        name: of the module whose weight it is.
        function: of the call.
        weights: the names of the parameters in it.
        step: how many calls with the same weights came before.
        order: number of the call.
        trained: whether one of the parameters requires a gradient.
        inputs: the model's inputs it was computed from, as bits.
        squares: of the gradient's norm, added over batches in the loss's own units.
        elements: of the gradient.
        finite: whether all of it is.
        seen: whether any gradient arrived.
        steps: of a fused recurrent layer, the squares of dL/d(input), step by step.
        step_elements: and of how many elements.
    """

    name: str
    function: str
    weights: tuple[str, ...]
    step: int
    order: int
    trained: bool
    inputs: int
    squares: float = 0.0
    elements: int = 0
    finite: bool = True
    seen: bool = False
    steps: list[float] = field(default_factory=list)
    step_elements: list[int] = field(default_factory=list)

    def add(self, gradient: Tensor, unit: float) -> None:
        """Take in one batch's gradient."""
        gradient = dense(gradient.detach())
        norm = norm_of(gradient) if gradient.numel() else 0.0
        self.seen, self.finite = True, self.finite and math.isfinite(norm)
        self.elements += gradient.numel()
        self.squares = math.hypot(math.sqrt(self.squares), norm * unit) ** 2

    def add_steps(self, rows: list[Tensor], unit: float) -> None:
        """Take in one batch's dL/d(input), step by step."""
        for t, row in enumerate(rows):
            if t == len(self.steps):
                self.steps.append(0.0)
                self.step_elements.append(0)
            self.steps[t] += (norm_of(row) * unit) ** 2
            self.step_elements[t] += row.numel()

    @property
    def norm(self) -> float:
        """L2 norm over the whole batch."""
        return math.sqrt(self.squares)


@dataclass
class PoolReading:
    """The gradient before and after one average over positions.

    Attributes:
        order: number of the call.
        function: of the call.
        positions: how many elements go into one.
        into: norm of the whole gradient at what it takes.
        out: norm of the gradient at what it gives.
    """

    order: int
    function: str
    positions: float
    into: float = 0.0
    out: float = 0.0

    @property
    def decades(self) -> float:
        """Decades that the gradient's norm loses in it; negative where it gains."""
        return math.log10(self.out / self.into) if self.into > 0 and self.out > 0 else 0.0


@dataclass
class CallGraph:
    """Which call took the results of which, by number; 0 is no call.

    Attributes:
        parents: by call, the calls whose results it took.
        names: by call, the function.
        result: the call that gave the loss.
    """

    parents: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    names: list[str] = field(default_factory=lambda: [""])
    result: int = 0

    def ancestors(self, call: int, without: int = -1) -> set[int]:
        """Every call that ``call`` depends on, itself included, by ways that do not pass ``without``."""
        seen, stack = set[int](), [call]
        while stack:
            one = stack.pop()
            if one not in seen and one != without:
                seen.add(one)
                stack += self.parents[one]
        return seen


class SiteRecorder(TorchFunctionMode):
    """Reads sites and pools in one forward and backward pass.

    Args:
        model: whose parameters are weights.
        inputs: what the model is called with.
        sites: readings of earlier batches, taken up again in the same order.
    """

    def __init__(self, model: nn.Module, inputs: Any, sites: list[SiteReading], pools: list[PoolReading]):
        super().__init__()
        self.sites, self.pools = sites, pools
        self.at_site, self.at_pool = 0, 0
        self.graph = CallGraph()
        # Calls that take what a gradient could go to, and give what none can: detach, or any call under no_grad.
        self.cuts: list[tuple[int, str]] = []
        # By boundary: the call that gave it, and the inputs it was computed from.
        self.boundaries: dict[int, tuple[int, int]] = {}
        self._calls: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.unit: list[float] = []  # what one unit of a gradient is worth, once the seed is known
        self.seen: Counter[tuple[str, ...]] = Counter()
        self._held: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if id(p) not in self._held or self._get(p) is None:
                self._set(p, (frozenset({name}), p.requires_grad, p.ndim))
        self._inputs: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        for i, tensor in enumerate(tensors_in(inputs)):
            self._inputs[id(tensor)] = weakref.ref(tensor), 1 << min(i, 60)

    # --- what a tensor is ---

    def _get(self, tensor: Tensor) -> Any:
        entry = self._held.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _set(self, tensor: Tensor, value: Any) -> None:
        self._held[id(tensor)] = weakref.ref(tensor), value

    def inputs_of(self, tensor: Tensor) -> int:
        """The model's inputs that a tensor was computed from, as bits."""
        entry = self._inputs.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else 0

    @property
    def order(self) -> int:
        """The number of the last call."""
        return len(self.graph.parents) - 1

    def call_of(self, tensor: Tensor) -> int:
        """The call that gave what a tensor holds now, or 0."""
        entry = self._calls.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else 0

    def note_boundary(self, i: int, tensor: Tensor) -> None:
        """Note the tensor that takes a boundary's place."""
        self.boundaries.setdefault(i, (self.call_of(tensor) or self.order, self.inputs_of(tensor)))

    # --- calls ---

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _QUERIES:
            return func(*args, **kwargs)
        if name == "multi_head_attention_forward":
            with self:
                return _body(func)(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        weights = [w for t in tensors if (w := self._get(t)) is not None]
        data = 0
        for t in tensors:
            data |= self.inputs_of(t)
        taken = tensors[0] if tensors else None
        parents = tuple({c for t in tensors if (c := self.call_of(t))})
        output = func(*args, **kwargs)
        results = _tensors((output,), None)
        if name == "__setitem__" and taken is not None:
            results = [taken]
        self.graph.parents.append(parents)
        self.graph.names.append(name)
        for r in results:
            self._calls[id(r)] = weakref.ref(r), self.order
        if weights and len(weights) == len([t for t in tensors if t.is_floating_point()]) and not data:
            self._derive(results, weights)
            return output
        for r in results:
            if data:
                self._inputs[id(r)] = weakref.ref(r), data
        if not results:
            return output
        given = any(t.requires_grad for t in tensors if self._get(t) is None)
        if (
            given
            and not any(r.requires_grad for r in results)
            and any(r.is_floating_point() for r in results)
        ):
            self.cuts.append((self.order, name))
        if weights and name in WEIGHTED and max(w[2] for w in weights) >= 2:
            self._site(name, weights, data, results, args)
        elif name in POOLS and taken is not None:
            self._pool(name, taken, results[0])
        elif name in SCALINGS and taken is not None and self.call_of_sum(parents):
            self._pool(name, taken, results[0], self.call_of_sum(parents))
        return output

    def call_of_sum(self, parents: tuple[int, ...]) -> float:
        """How many positions were summed where one of ``parents`` is a sum; else 0. A sum times a constant is an average."""
        last = self.pools[self.at_pool - 1] if self.at_pool else None
        return (
            last.positions if last is not None and last.function == "sum" and last.order in parents else 0.0
        )

    def _derive(self, results: list[Tensor], weights: list[Any]) -> None:
        names = frozenset().union(*(w[0] for w in weights))
        trained, ndim = any(w[1] for w in weights), max(w[2] for w in weights)
        for r in results:
            if r.is_floating_point():
                self._set(r, (names, trained, ndim))

    def _site(self, name: str, weights: list[Any], data: int, results: list[Tensor], args: Any) -> None:
        matrices = [w for w in weights if w[2] >= 2] or weights
        names = tuple(sorted(frozenset().union(*(w[0] for w in matrices))))
        step = self.seen[names]
        self.seen[names] += 1
        if self.at_site == len(self.sites) or self.sites[self.at_site].weights != names:
            owner = names[0].rpartition(".")[0] or names[0]
            new = SiteReading(owner, name, names, step, self.order, any(w[1] for w in matrices), data)
            self.sites.insert(self.at_site, new)
        site = self.sites[self.at_site]
        self.at_site += 1
        for target in results:
            if target.requires_grad:
                target.register_hook(_reader(site.add, self.unit))
        if name in FUSED and isinstance(args[0], Tensor) and args[0].requires_grad:
            given = args[1] if len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point() else None  # fmt: skip
            sizes = None if given is None else given.tolist()
            batch_first = sizes is None and bool(args[-1])

            def by_step(gradient: Tensor, unit: float) -> None:
                site.add_steps(_by_step(gradient, sizes, batch_first), unit)

            args[0].register_hook(_reader(by_step, self.unit))

    def _is_joined(self, call: int, steps: int = 4) -> bool:
        """Whether what a call takes was put side by side just before: a sum over that is a merge, no average."""
        for parent in self.graph.parents[call]:
            if self.graph.names[parent] in _JOINS or (steps and self._is_joined(parent, steps - 1)):
                return True
        return False

    def _pool(self, name: str, taken: Tensor, given: Tensor, positions: float = 0.0) -> None:
        if not (given.requires_grad and taken.requires_grad and given.numel() > 1 and taken.ndim > 1):
            return
        positions = positions or taken.numel() / given.numel()
        if positions <= 1 or self._is_joined(self.order):
            return
        if self.at_pool == len(self.pools):
            self.pools.append(PoolReading(self.order, name, positions))
        pool = self.pools[self.at_pool]
        self.at_pool += 1
        taken.register_hook(_reader(lambda g, u: _raise(pool, "into", g, u), self.unit))
        given.register_hook(_reader(lambda g, u: _raise(pool, "out", g, u), self.unit))


def _raise(pool: PoolReading, name: str, gradient: Tensor, unit: float) -> None:
    setattr(pool, name, math.hypot(getattr(pool, name), norm_of(dense(gradient.detach())) * unit))


def _reader(add: Callable[[Tensor, float], None], unit: list[float]) -> Callable[[Tensor | None], None]:
    def read(gradient: Tensor | None) -> None:
        # The hooks also run while the seed is being found.
        if unit and gradient is not None:
            add(gradient, unit[0])

    return read


def _by_step(gradient: Tensor, sizes: list[int] | None, batch_first: bool) -> list[Tensor]:
    """What is there at each step: of ``[T, B, F]``, ``[B, T, F]``, ``[T, F]`` or packed rows."""
    value = gradient.detach()
    if sizes is not None:
        return list(value.split(sizes))
    return list(value.transpose(0, 1) if value.ndim == 3 and batch_first else value)


def _tensors(args: Iterable[Any], kwargs: dict[str, Any] | None) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value, None)
    return found


def _body(func: FunctionType) -> FunctionType:
    """A Python function of torch's that runs its own body under the mode, where it would hand itself over."""
    plain = {n: lambda *_: False for n in func.__code__.co_names if n.startswith("has_torch_function")}
    copied = FunctionType(func.__code__, {**func.__globals__, **plain}, func.__name__, func.__defaults__, func.__closure__)  # fmt: skip
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied
