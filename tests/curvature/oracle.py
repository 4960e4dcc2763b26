"""Slow, dense float64 oracles: the whole Hessian of a model, written without skipscope."""

import copy

import numpy as np
import torch
from torch import nn


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def dense_hessian(model: nn.Module, x, y, loss) -> np.ndarray:
    """Row by row: the derivative of each entry of the gradient."""
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in gradient]):
        if not entry.requires_grad:
            rows.append(torch.zeros(sum(p.numel() for p in parameters), dtype=entry.dtype))
            continue
        row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).reshape(-1) if r is None else r.reshape(-1)
                    for r, p in zip(row, parameters)
                ]
            )
        )
    return torch.stack(rows).detach().numpy()


def dense_gauss_newton(model: nn.Module, x, y, loss) -> np.ndarray:
    """J' (d2l/df2) J from dense Jacobians."""
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    output = model(x)
    rows = [
        torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in output.reshape(-1)
    ]
    jacobian = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros_like(p).reshape(-1) if r is None else r.reshape(-1)
                    for r, p in zip(row, parameters)
                ]
            )
            for row in rows
        ]
    )
    second = torch.autograd.functional.hessian(
        lambda f: loss(f.reshape(output.shape), y), output.detach().reshape(-1)
    )
    return (jacobian.T @ second @ jacobian).detach().numpy()


def matrix_of(operator) -> np.ndarray:
    return operator @ np.eye(operator.shape[0])


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(found - truth).max() / max(np.abs(truth).max(), 1e-300))
