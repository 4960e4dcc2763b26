"""One check over every public function and every awkward model: nothing has changed, whatever happened.

Looked at: every attribute of every module down to the bits of every tensor and array in it, the identity of
parameters, buffers, gradients and containers, training flags, requires_grad, hooks; the user's data; every global
generator and torch's global switches. Whatever happened: the call returned, or an exception or Ctrl-C came at the first,
a middle or the last call of any module.

A fixed part runs in CI: every function on every animal when it returns, and the interruptions on a few. The rest is slow.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import types
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipscope as ss
from skipscope import book
from skipscope._data import inputs_of
from skipscope._errors import SkipscopeError
from skipscope._random import drawn_apart
from skipscope._untouched import untouched
from skipscope.testing import check_shortcut
from zoo import ZOO, Net

CALLS: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "find_shortcuts": lambda model, data, loss: ss.find_shortcuts(model, inputs_of(data)),
    "ablate": lambda model, data, loss: [ss.ablate(model, inputs=inputs_of(data), how=how, allow_empty=True) for how in ("remove", "detach", "lesion")],
    "ablate_sharing": lambda model, data, loss: ss.ablate(model, inputs=inputs_of(data), strength=0.5, share=True, allow_empty=True),
    "rewire": lambda model, data, loss: _rewired(model, inputs_of(data)),
    "add_shortcuts": lambda model, data, loss: ss.add_shortcuts(model, inputs_of(data)),
    "recalibrate": lambda model, data, loss: ss.recalibrate(ss.ablate(model, inputs=inputs_of(data), allow_empty=True), data),
    "gradient_flow": lambda model, data, loss: ss.gradient_flow(model, data, loss),
    "gradient_split": lambda model, data, loss: ss.gradient_split(model, data, loss),
    "path_spectrum": lambda model, data, loss: ss.path_spectrum(model, data, loss),
    "importance": lambda model, data, loss: ss.importance(model, data, loss, allow_empty=True),
    "landscape": lambda model, data, loss: ss.landscape(model, data, loss, grid=3),
    "paired_landscapes": lambda model, data, loss: ss.paired_landscapes({"a": model, "b": model}, data, loss, grid=3),
    "extreme_eigenvalues": lambda model, data, loss: ss.extreme_eigenvalues(model, data, loss, tol=0.5, max_products=4),
    "spectral_density": lambda model, data, loss: ss.spectral_density(model, data, loss, probes=2, steps=2),
    "curvature_trace": lambda model, data, loss: ss.curvature_trace(model, data, loss, products=3),
    "curvature_map": lambda model, data, loss: ss.curvature_map(model, data, loss, grid=2, tol=0.5, max_products=3),
    "curvature_operator": lambda model, data, loss: _one_product(ss.curvature_operator(model, data, loss)),
    "random_direction": lambda model, data, loss: ss.random_direction(model),
    "solutions_plane": lambda model, data, loss: ss.solutions_plane(model, _moved(model, 1)),
    "trajectory_plane": lambda model, data, loss: ss.trajectory_plane(model, [_moved(model, 1), _moved(model, 2)]),
    "train_twins": lambda model, data, loss: ss.train_twins({"a": model}, data, loss, seeds=1, steps=2, optimizers={"SGD": [0.1]}),
    "compare": lambda model, data, loss: ss.compare(model, data, loss, train=False, grid=3),
    "watch": lambda model, data, loss: _watched(model, data, loss),
    "prescribe": lambda model, data, loss: ss.prescribe(model, data, loss, steps=2),
    "print_gradients": lambda model, data, loss: book.print_gradients(model, inputs_of(data)),
    "check_shortcut": lambda model, data, loss: check_shortcut(model, inputs_of(data), compile=False),
}  # fmt: skip

# Functions that take seconds on some animals: CI runs each on every fifth.
COSTLY = {
    "compare", "importance", "extreme_eigenvalues", "spectral_density", "curvature_trace", "curvature_operator",
    "curvature_map", "landscape", "paired_landscapes", "train_twins", "prescribe",
}  # fmt: skip

# Public names that touch no model of the user's.
HARMLESS = {
    "book", "nn", "reference", "testing", "batches", "objective", "SkipscopeError", "progress", "load",
    "side_by_side", "mark_shortcut", "style",
    *(name for name in ss.__all__ if not name.islower()),  # classes
}  # fmt: skip


def _add_what_is_new() -> None:
    """A public function of ``(model, data, loss)`` that nobody has listed is checked all the same, as small as it can."""
    small = {"grid": 2, "steps": 2, "max_products": 3, "tol": 0.5, "train": False}
    for name in sorted(set(ss.__all__) - HARMLESS - set(CALLS)):
        function = getattr(ss, name)
        given = list(inspect.signature(function).parameters)
        options = {key: value for key, value in small.items() if key in given}
        if given[:3] == ["model", "data", "loss"]:
            CALLS[name] = partial(function, **options)
            COSTLY.add(name)
        elif given[:2] == ["model", "inputs"]:
            CALLS[name] = lambda model, data, loss, function=function: function(model, inputs_of(data))


def _rewired(model: nn.Module, inputs: Any) -> Any:
    """A rewired twin; a merge that does not fit the kind is refused, and the model must be whole then too."""
    found = ss.find_shortcuts(model, inputs)
    if len(found):
        with contextlib.suppress(SkipscopeError):
            ss.rewire(model, found, kind="rezero")


def _moved(model: nn.Module, by: float) -> dict[str, Any]:
    def moved(value: Tensor) -> Tensor:
        if isinstance(value, nn.parameter.UninitializedTensorMixin):
            return value
        wave = torch.linspace(0, 9, value.numel()).add(by).sin().reshape(value.shape)
        return (
            value.detach() + wave.to(value.dtype)
            if value.is_floating_point() and not value.is_meta
            else value
        )

    return {name: moved(v) if isinstance(v, Tensor) else v for name, v in model.state_dict().items()}


def _one_product(operator: Any) -> Any:
    return operator.matvec(np.ones(operator.shape[1]))


def _watched(model: nn.Module, data: Any, loss: Any) -> None:
    if not list(model.parameters()):
        return
    batches, read_loss = ss._data.read(model, data, loss, "watch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ss.watch(model, optimizer), untouched(model):
        read_loss(model, batches.first()).backward()


_add_what_is_new()


# --- the check ---


def state_of(*things: Any) -> dict[str, Any]:
    """Everything that can be seen of ``things`` and of the global state, as path -> something comparable."""
    seen: dict[str, Any] = {}
    visited: set[int] = set()
    for i, thing in enumerate(things):
        _walk(thing, f"{i}", seen, visited)
    seen |= {
        "python's generator": random.getstate(),
        "numpy's generator": repr(np.random.get_state()),
        "torch's generator": bytes(torch.get_rng_state()),
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fast encoder": torch.backends.mha.get_fastpath_enabled(),
        "global hooks": [list(value) for value in _global_hooks()],
    }
    return seen


def _global_hooks() -> list[Mapping[int, Any]]:
    return [v for k, v in vars(nn.modules.module).items() if k.startswith("_global") and isinstance(v, dict)]


def _walk(thing: Any, path: str, seen: dict[str, Any], visited: set[int]) -> None:
    if isinstance(thing, Tensor):
        seen[path] = (id(thing), thing.requires_grad, _bits(thing), list(thing._backward_hooks or ()))
        if thing.is_leaf and thing.grad is not None and id(thing) not in visited:
            visited.add(id(thing))
            _walk(thing.grad, f"{path}.grad", seen, visited)
        elif thing.is_leaf:
            seen[f"{path}.grad"] = thing.grad is None
        return
    if isinstance(thing, int | float | complex | str | bytes | bool | type(None) | type):
        seen[path] = (type(thing), repr(thing))
        return
    seen[path] = id(thing)
    if id(thing) in visited:
        return
    visited.add(id(thing))
    if isinstance(thing, np.ndarray):
        seen[f"{path} bits"] = thing.tobytes()
    elif isinstance(thing, torch.Generator):
        seen[f"{path} state"] = bytes(thing.get_state())
    elif isinstance(thing, np.random.Generator):
        seen[f"{path} state"] = repr(thing.bit_generator.state)
    elif isinstance(thing, random.Random):
        seen[f"{path} state"] = thing.getstate()
    elif isinstance(thing, Mapping):
        seen[f"{path} keys"] = [repr(key) for key in thing]
        for key, item in thing.items():
            _walk(item, f"{path}[{key!r}]", seen, visited)
    elif isinstance(thing, set | frozenset):
        seen[f"{path} items"] = sorted(map(repr, thing))
    elif isinstance(thing, list | tuple | deque):
        seen[f"{path} length"] = len(thing)
        for i, item in enumerate(thing):
            _walk(item, f"{path}[{i}]", seen, visited)
    elif type(thing).__module__.startswith("torch.") and not isinstance(thing, nn.Module):
        pass  # torch's own machinery (a compiler's caches) may learn from a call
    elif hasattr(thing, "__dict__") and not isinstance(thing, types.FunctionType | types.ModuleType):
        _walk(vars(thing), f"{path}.", seen, visited)


def _bits(tensor: Tensor) -> Any:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "uninitialised"
    tensor = tensor.detach()
    if tensor.is_meta:
        return tuple(tensor.shape)
    if tensor.is_sparse:
        return _bits(tensor.coalesce().values())
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Paths that are gone, new or changed."""
    return [path for path in before.keys() | after.keys() if before.get(path, ...) != after.get(path, ...)]


# --- endings ---


class Planted(Exception):
    """What is thrown into the middle of a call."""


class _Calls:
    """Counts the calls of all modules, and raises at one of them; a global hook, so the model carries nothing."""

    def __init__(self, at: int | None = None, error: type[BaseException] = Planted):
        self.at, self.error, self.count = at, error, 0

    def __enter__(self):
        self.hook = nn.modules.module.register_module_forward_pre_hook(self._step)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _step(self, module, args):
        self.count += 1
        if self.count == self.at:
            raise self.error


def run_and_compare(
    call: Callable[..., Any], name: str, at: int | None = None, error: type = Planted
) -> tuple[list[str], int, Any]:
    """Call once on a fresh animal: what changed, how many module calls there were, and what was raised."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    animal = ZOO[name]
    model, data = animal.make(), animal.data()
    before, raised = state_of(model, data), None
    with _Calls(at, error) as calls:
        try:
            result = call(model, data, animal.loss)
        except (Exception, KeyboardInterrupt) as caught:
            raised, result = caught.with_traceback(None), None
    changed = differences(before, state_of(model, data))
    del result
    return sorted(changed), calls.count, raised


@pytest.fixture(autouse=True)
def _quiet(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pairs() -> list[Any]:
    def is_slow(i: int, j: int, function: str, animal: Any) -> bool:
        return animal.slow or (function in COSTLY and (i + j) % 5 > 0)

    return [
        pytest.param(function, name, marks=pytest.mark.slow if is_slow(i, j, function, animal) else ())
        for i, (name, animal) in enumerate(ZOO.items())
        for j, function in enumerate(CALLS)
    ]


@pytest.mark.parametrize("function, name", _pairs())
def test_nothing_has_changed_after_a_call(function, name):
    changed, _, raised = run_and_compare(CALLS[function], name)
    assert not changed
    assert raised is None or isinstance(raised, ss.SkipscopeError) or name == "raises_on_its_second_call", (
        repr(raised)
    )


def _interrupted(function: str, name: str) -> None:
    _, count, _ = run_and_compare(CALLS[function], name)
    for at in sorted({1, (count + 1) // 2, count} - {0}):
        for error in (Planted, KeyboardInterrupt):
            changed, reached, raised = run_and_compare(CALLS[function], name, at, error)
            assert not changed, f"{error.__name__} at module call {at} of {count}"
            assert error is Planted or reached < at or isinstance(raised, KeyboardInterrupt)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("name", ["batch_norm_in_training_mode", "keeps_its_activations"])
def test_nothing_has_changed_after_an_interruption(function, name):
    _interrupted(function, name)


@pytest.mark.slow
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("name", ZOO)
def test_nothing_has_changed_after_an_interruption_anywhere(function, name):
    _interrupted(function, name)


def test_every_public_function_is_on_the_list():
    assert set(ss.__all__) - HARMLESS <= set(CALLS)


# --- the check can fail ---


PLANTED = {
    "a parameter": lambda model: model.head.weight.data.add_(1e-7),
    "the last bit of a parameter": lambda model: (
        model.head.weight.data.view(torch.int32).view(-1)[0].bitwise_xor_(1)
    ),
    "a parameter's identity": lambda model: setattr(
        model.head, "weight", nn.Parameter(model.head.weight.data)
    ),
    "a parameter's sign of zero": lambda model: model.head.bias.data.neg_(),
    "a buffer": lambda model: model.get_buffer("buffer").add_(1),
    "a buffer's identity": lambda model: setattr(model, "buffer", model.get_buffer("buffer").clone()),
    "a gradient made": lambda model: setattr(model.head.bias, "grad", torch.zeros(3)),
    "a gradient's identity": lambda model: setattr(model.head.weight, "grad", model.head.weight.grad.clone()),
    "a gradient's value": lambda model: model.head.weight.grad.mul_(2),
    "a gradient removed": lambda model: setattr(model.head.weight, "grad", None),
    "training": lambda model: model.blocks[1].eval(),
    "requires_grad": lambda model: model.head.bias.requires_grad_(False),
    "a forward hook": lambda model: model.head.register_forward_hook(lambda *_: None),
    "a removed hook": lambda model: model.hook.remove(),
    "a tensor hook": lambda model: model.head.bias.register_hook(lambda gradient: None),
    "a global hook": lambda model: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "an attribute made": lambda model: setattr(model, "new", 1),
    "an attribute changed": lambda model: setattr(model, "number", 2),
    "an attribute removed": lambda model: delattr(model, "number"),
    "a list": lambda model: model.items.append(1),
    "deep in a container": lambda model: model.nested["a"][0].update(b=2),
    "an array": lambda model: model.array.__setitem__(0, 1.0),
    "its own generator": lambda model: torch.rand(1, generator=model.generator),
    "a new module": lambda model: model.add_module("new", nn.Identity()),
    "the order of modules": lambda model: model._modules.update(blocks=model._modules.pop("blocks")),
    "python's generator": lambda model: random.random(),
    "numpy's generator": lambda model: np.random.rand(),
    "torch's generator": lambda model: torch.rand(1),
    "gradients disabled": lambda model: torch.set_grad_enabled(False),
    "the default dtype": lambda model: torch.set_default_dtype(torch.float64),
    "the data": lambda model: model.data.add_(1),
}


class Planting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(2))
        self.head.weight.grad = torch.ones(3, 8)
        self.head.bias.data.zero_()
        self.hook = self.head.register_forward_hook(lambda *_: None)
        self.number, self.items, self.nested, self.array = 1, [], {"a": [{"b": 1}]}, np.zeros(3)
        self.generator = torch.Generator()


@pytest.mark.parametrize("what", PLANTED)
def test_the_check_sees(what):
    model, data = Planting(), torch.zeros(4, 8)
    before = state_of(model, data)
    assert not differences(before, state_of(model, data))
    hooks = [dict(value) for value in _global_hooks()]
    try:
        if what == "the data":
            data.add_(1)
        else:
            PLANTED[what](model)
        assert differences(before, state_of(model, data))
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        for value, kept in zip(_global_hooks(), hooks):
            value.clear()
            value.update(kept)


@pytest.mark.parametrize(
    "name", ["batch_norm_in_training_mode", "keeps_its_activations", "spectral_norm", "caches_in_a_list"]
)
def test_the_check_sees_a_function_that_is_careless(name):
    def careless(model, data, loss):
        model(data[0])

    assert run_and_compare(careless, name)[0]


def test_an_interruption_is_really_planted():
    for error in (Planted, KeyboardInterrupt):
        _, count, raised = run_and_compare(CALLS["gradient_flow"], "residual", at=2, error=error)
        assert count == 2 and isinstance(raised, error)


LOADED = {
    "gradient_flow": ss.gradient_flow,
    "path_spectrum": ss.path_spectrum,
    "importance": lambda *given: ss.importance(*given, allow_empty=True),
    "extreme_eigenvalues": lambda *given: ss.extreme_eigenvalues(*given, max_products=3),
    "landscape": lambda *given: ss.landscape(*given, grid=3),
    "train_twins": lambda model, *given: ss.train_twins({"a": model}, *given, steps=2, seeds=1),
}


class _Draws(torch.utils.data.Dataset):
    """Samples that draw from all three generators, as augmentations do."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(4) + random.random() + np.random.rand(), i % 3


@pytest.mark.parametrize("call", LOADED)
def test_data_that_draw_leave_the_random_state(call):
    loader = torch.utils.data.DataLoader(_Draws(), batch_size=5, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    LOADED[call](model, loader, F.cross_entropy)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_what_is_drawn_apart_goes_on_from_batch_to_batch():
    torch.manual_seed(0)
    expected = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(0)
    items = (torch.rand(1).item() for _ in range(3))
    drawn = []
    for value in drawn_apart(items):
        torch.rand(7)  # what runs between draws from the global state, and does not disturb
        drawn.append(value)
    assert drawn == expected
    assert len(set(expected)) == 3


class _FrozenNorms(Net):
    """Keeps its norm in evaluation mode while it trains, as detection models do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def test_layers_that_a_model_keeps_frozen_stay_so_in_training_mode():
    model = _FrozenNorms().eval()
    with untouched(model, training=True):
        assert model.training and model.head.training and not model.norm.training
    assert not model.training


def test_the_modes_of_a_model_without_its_own_train_are_all_set():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2).eval()))
    with untouched(model, training=True):
        assert all(module.training for module in model.modules())
    with untouched(model, training=False):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, True, False]


@pytest.mark.parametrize("mode", [True, False])
def test_numbers_of_a_model_that_merges_its_weights_are_those_of_the_model_as_it_is(mode):
    torch.manual_seed(0)
    animal = ZOO["merges_weights_in_evaluation_mode"]
    model, data = animal.make().train(mode), animal.data()
    loss = float(F.cross_entropy(model(data[0]), data[1]).detach())
    surface = ss.landscape(model, data, F.cross_entropy, grid=3)
    assert surface.values[1, 1] == pytest.approx(loss, rel=1e-6) and surface.checks.weights_restored
    operator = ss.curvature_operator(model, data, F.cross_entropy)
    products = [operator.matvec(np.ones(operator.shape[1])) for _ in range(3)]
    assert np.array_equal(products[0], products[2])
    values = [float(operator.model.output_and_loss(data, 0)[1].detach()) for _ in range(3)]
    assert values == pytest.approx([loss] * 3, rel=1e-6)
