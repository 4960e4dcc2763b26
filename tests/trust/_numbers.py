"""Numbers: against dense float64 references, over ways of cutting data into batches, and where memory does not suffice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipscope as ss
from skipscope import _data
from trust._hazard import Hazard, attempt, replaced

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.tanh, F.gelu, F.silu, torch.sigmoid, F.softplus)
SIZE = 5

MEASURES: dict[str, Callable[..., Any]] = {
    "gradient_flow": ss.gradient_flow,
    "path_spectrum": ss.path_spectrum,
    "extreme_eigenvalues": ss.extreme_eigenvalues,
}


class Chain(nn.Module):
    """x -> s x + f(W x), some number of times, then a linear head; in float64."""

    def __init__(self, depth: int, activation: Callable[[Tensor], Tensor], scale: float):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(depth))
        self.head, self.activation, self.scale = nn.Linear(SIZE, 3), activation, scale
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.scale * x + self.activation(layer(x))
        return self.head(x)


def _close(measured: Any, true: Any, tolerance: float = 1e-9) -> bool:
    measured, true = np.asarray(measured, float), np.asarray(true, float)
    return measured.shape == true.shape and bool(
        np.allclose(measured, true, rtol=tolerance, atol=tolerance * np.abs(true).max())
    )


def _flow_by_hand(model: Chain, x: Tensor, y: Tensor) -> list[float]:
    """RMS of dL/dx at the input and at each merge, by autograd alone."""
    states = [x.clone().requires_grad_()]
    for layer in model.layers:
        states.append(model.scale * states[-1] + model.activation(layer(states[-1])))
    gradients = torch.autograd.grad(F.cross_entropy(model.head(states[-1]), y), states)
    return [float(g.square().mean().sqrt()) for g in gradients]


def _spectrum_by_hand(model: Chain, x: Tensor, y: Tensor) -> list[float]:
    """The norm of the gradient through exactly k branches, path by path."""
    states = [x]
    for layer in model.layers:
        states.append(model.scale * states[-1] + model.activation(layer(states[-1])))
    last = states[-1].detach().requires_grad_()
    (seed,) = torch.autograd.grad(F.cross_entropy(model.head(last), y), last)
    sums = [torch.zeros_like(x) for _ in range(len(model.layers) + 1)]
    for crossed in itertools.product((False, True), repeat=len(model.layers)):
        gradient = seed
        for layer, state, through in zip(reversed(model.layers), reversed(states[:-1]), crossed):
            if through:
                inside = state.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(model.activation(layer(inside)), inside, gradient)
            else:
                gradient = model.scale * gradient
        sums[sum(crossed)] += gradient
    return [float(total.norm()) for total in sums]


def _eigenvalues_by_hand(model: Chain, x: Tensor, y: Tensor) -> tuple[float, float]:
    names = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in names.values()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in names.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(names.items(), parts)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    return float(values[0]), float(values[-1])


def derivatives(count: int) -> Iterator[str | None]:
    """Gradient flow, path spectrum and both ends of the Hessian of random residual networks, in float64."""
    for i in range(count):
        torch.manual_seed(i)
        depth, activation, scale = 1 + i % 6, ACTIVATIONS[i % len(ACTIVATIONS)], (1.0, 0.5, 1.3)[i % 3]
        model = Chain(depth, activation, scale)
        x, y = torch.randn(7, SIZE, dtype=torch.float64), torch.randint(0, 3, (7,))
        flow = MEASURES["gradient_flow"](model, (x, y), F.cross_entropy)
        by_hand = _flow_by_hand(model, x, y)
        read = [b.gradient_rms * flow.output_gradient_norm for b in flow.boundaries][: len(by_hand)]
        if not _close(read, by_hand):
            yield f"gradient flow of network {i}: {read} is not {by_hand}"
            continue
        paths = MEASURES["path_spectrum"](model, (x, y), F.cross_entropy)
        if not _close(paths.norms, _spectrum_by_hand(model, x, y)):
            yield f"path spectrum of network {i}: {paths.norms} is not {_spectrum_by_hand(model, x, y)}"
            continue
        if depth <= 3:
            ends = MEASURES["extreme_eigenvalues"](model, (x, y), F.cross_entropy, tol=1e-9)
            low, high = _eigenvalues_by_hand(model, x, y)
            if not _close([ends.smallest[0], ends.largest[0]], [low, high], 1e-6):
                yield f"ends of the Hessian of network {i}: {ends.smallest}, {ends.largest} are not {low}, {high}"
                continue
        yield None


def _off_by_a_millionth():
    original = MEASURES["path_spectrum"]

    def spectrum(model, data, loss):
        from dataclasses import replace

        result = original(model, data, loss)
        return replace(result, norms=result.norms * (1 + 1e-6))

    return replaced((MEASURES, "path_spectrum", spectrum))


# --- batches ---


class ClassWeighted:
    """Cross-entropy with class weights; a stock loss, so its normaliser is known."""

    def __new__(cls):
        return nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))


LOSSES: dict[str, Callable[[], Any]] = {
    "cross_entropy": lambda: F.cross_entropy,
    "ignore_index": lambda: nn.CrossEntropyLoss(ignore_index=1),
    "class weights": ClassWeighted,
    "ignore_index and class weights": lambda: nn.CrossEntropyLoss(
        weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), ignore_index=0
    ),
}


def normalisation(count: int) -> Iterator[str | None]:
    """The loss and its curvature of one batch, and of the same samples in 2 to 5 batches of unequal size."""
    for i in range(count):
        torch.manual_seed(i)
        name = list(LOSSES)[i % len(LOSSES)]
        model = Chain(2, torch.tanh, 1.0)
        x, y = torch.randn(32, SIZE, dtype=torch.float64), torch.randint(0, 3, (32,))
        cuts = sorted(torch.randperm(31)[: 1 + i % 4].add(1).tolist())
        parts = list(zip(x.tensor_split(cuts), y.tensor_split(cuts)))
        whole, cut = (
            attempt(
                lambda data=data: ss.landscape(model, data, LOSSES[name](), grid=3, strategy="plain"),
                ss.SkipscopeError,
            )
            for data in ((x, y), ss.batches(parts))
        )
        if cut[1] is not None or whole[1] is not None:
            yield f"{name} in {len(parts)} batches was refused: {cut[1] or whole[1]}"
        elif not _close(cut[0].values, whole[0].values, 1e-10):
            yield f"{name} in {len(parts)} batches: {cut[0].values[1, 1]} is not {whole[0].values[1, 1]}"
        else:
            yield None


def _every_batch_counts_the_same():
    return replaced((_data, "_first_fitting_weight", lambda *_: lambda batch: 1.0))


# --- memory that does not suffice ---


class Huge(nn.Module):
    """Weights that a call cannot hold several times: 200,000, of which three are read."""

    def __init__(self):
        super().__init__()
        self.large, self.head = nn.Parameter(torch.zeros(200_000)), nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.large[:3]


def too_large(count: int) -> Iterator[str | None]:
    """Requests that need more memory than is free: refused in words before anything is taken."""
    from skipscope import _free_memory

    x, y = torch.randn(4, SIZE), torch.randint(0, 3, (4,))
    model = Huge()
    calls = {
        "extreme_eigenvalues": lambda: ss.extreme_eigenvalues(model, (x, y), F.cross_entropy, basis=40),
        "spectral_density": lambda: ss.spectral_density(model, (x, y), F.cross_entropy, steps=60),
    }
    with replaced(
        *((m, "free_bytes", lambda device: FREE["bytes"]) for m in _readers_of_free_memory(_free_memory))
    ):
        for name, call in itertools.islice(calls.items(), count):
            _, error = attempt(call, ss.SkipscopeError)
            yield None if error is not None and "memory" in str(error) else f"{name} was not refused: {error}"


FREE = {"bytes": 8e6}


def _readers_of_free_memory(home: Any) -> list[Any]:
    import sys

    names = [n for n in sys.modules if n.startswith("skipscope.")]
    return [
        sys.modules[n] for n in names if getattr(sys.modules[n], "free_bytes", None) is home.free_bytes
    ] + [home]


def _believes_in_endless_memory():
    return replaced((FREE, "bytes", float("inf")))


NUMBERS = (
    Hazard("Wrong derivatives", "flow, path spectrum and Hessian ends of a random network, against dense float64", derivatives, _off_by_a_millionth, 60, 2),
    Hazard("Wrong normalisation of a loss", "one batch and the same samples in uneven batches, to 1e-10", normalisation, _every_batch_counts_the_same, 100, 4),
    Hazard("Memory that does not suffice", "a request for more memory than is free", too_large, _believes_in_endless_memory, 2, 2),
)  # fmt: skip
