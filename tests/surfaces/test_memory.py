"""What does not fit: directions are drawn anew with the same bits; more is refused with what would fit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces.evaluation import _memory_limits


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator), torch.randint(4, (40,), generator=generator)


@pytest.mark.parametrize("normalize", ["filter", "layer", "tensor", "none"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_directions_that_are_drawn_anew_give_the_same_bits(monkeypatch, normalize, orthogonal):
    options = {"grid": 5, "normalize": normalize, "orthogonal": orthogonal, "strategy": "plain", "zero": ()}
    held = ss.landscape(_model(), _batch(), F.cross_entropy, **options)
    monkeypatch.setattr("skipscope.surfaces.evaluation._twins_on_plane.directions_fit", lambda *_: False)
    drawn = ss.landscape(_model(), _batch(), F.cross_entropy, **options)
    assert np.array_equal(held.values, drawn.values) and drawn.checks == held.checks


def test_the_decision_follows_what_is_free(monkeypatch):
    model = nn.Linear(1000, 250)  # 1 MB
    for free, fits in ((1e9, True), (8e6, False)):
        monkeypatch.setattr(_memory_limits, "free_bytes", lambda device, free=free: free)
        assert _memory_limits.directions_fit([model], model.parameters(), 2) == fits
    monkeypatch.setattr(_memory_limits, "free_bytes", lambda device: 2e6)
    with pytest.raises(ss.SkipscopeError, match="does not fit into memory a second time"):
        _memory_limits.directions_fit([model], model.parameters(), 2)


def test_a_grid_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    with pytest.raises(ss.SkipscopeError, match="points an axis") as refused:
        _memory_limits.check_grid(10**12, 24)
    largest = int(str(refused.value).split("at most ")[1].split()[0].replace(",", ""))
    _memory_limits.check_grid(int(0.9 * largest) ** 2, 24)
