"""Calls on one model from several threads take turns: none sees what another has set on the model for a while."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.shortcuts import ablate, find_shortcuts


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, x):
        return x + self.f(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *(Block() for _ in range(3)), nn.Linear(8, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)


def test_a_twin_that_is_made_beside_a_measurement_is_a_copy_of_the_model_as_it_is():
    model, data, stop = network(), batch(), threading.Event()
    found = find_shortcuts(model, data[0])
    expected = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def measure():
        while not stop.is_set():
            ss.gradient_flow(model, data, F.cross_entropy)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        for _ in range(8):
            twin = ablate(model, found)
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
            assert all(m.training for m in twin.modules())
            assert all(torch.equal(buffer, expected[name]) for name, buffer in twin.named_buffers())
    finally:
        stop.set()
        thread.join()


def test_importance_from_several_threads():
    model, data = network(), batch()
    expected = ss.importance(model, data, F.cross_entropy).to_dict()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(ss.importance, model, data, F.cross_entropy) for _ in range(4)]
        assert all(call.result(timeout=300).to_dict() == expected for call in calls)
