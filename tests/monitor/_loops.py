"""Shared by the monitor's tests: small networks, an optimizer that notes what it receives, and the comparison."""

import math

import numpy as np
import torch
from torch import nn


def network(dtype=torch.float32, width=6, depth=3, seed=0):
    torch.manual_seed(seed)
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 1)).to(dtype)


def data(dtype=torch.float32, n=8, width=6):
    return torch.randn(n, width, dtype=dtype)


def loss_of(model, batch=None):
    batch = data(next(model.parameters()).dtype) if batch is None else batch
    return model(batch).square().mean()


def oracle(parameters):
    """``[2, P]``: L2 norm and mean |g| of each gradient in float64, element by element; NaN without gradient."""
    result = []
    for p in parameters:
        if p.grad is None:
            result.append((math.nan, math.nan))
            continue
        values = [abs(float(v)) for v in p.grad.detach().to_dense().double().flatten()]
        result.append((math.sqrt(math.fsum(v * v for v in values)), math.fsum(values) / len(values)))
    return np.array(result).T


def spying(kind):
    """An optimizer class that notes, inside its own step, the gradients that it receives."""

    class Spy(kind):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **{"lr": 0.05, **options})
            self.received = []

        def step(self, closure=None):
            if closure is None:
                self.received.append(oracle([p for group in self.param_groups for p in group["params"]]))
                return super().step()
            before = len(self.received)

            def noting():
                result = closure()
                if len(self.received) == before:
                    self.received.append(oracle([p for group in self.param_groups for p in group["params"]]))
                return result

            return super().step(noting)

    Spy.__name__ = f"Spy{kind.__name__}"
    return Spy


Spy = spying(torch.optim.SGD)


def agrees(history, received, tolerance=1e-6):
    """Every recorded number equals what the optimizer received."""
    expected = np.array(received)
    assert len(history) == len(received)
    np.testing.assert_allclose(history.norm, expected[:, 0], rtol=tolerance)
    np.testing.assert_allclose(history.mean_abs, expected[:, 1], rtol=tolerance)
