"""Complex weights: two coordinates of weight space each, in directions, planes, norms and regularisers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class Complex(nn.Module):
    """One complex matrix and a real one."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.w, self.head = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head((x.to(torch.complex64) @ self.w.T).abs())


class Real(nn.Module):
    """The same network with the complex matrix as real numbers ``[4, 3, 2]``."""

    def __init__(self, model):
        super().__init__()
        self.w = nn.Parameter(torch.view_as_real(model.w.detach()).clone())
        self.head = nn.Linear(4, 2)
        self.head.load_state_dict(model.head.state_dict())

    forward = lambda self, x: self.head((x.to(torch.complex64) @ torch.view_as_complex(self.w).T).abs())  # noqa: E731


MODELS = [Complex(seed) for seed in range(4)]
DATA = torch.randn(30, 3), torch.randint(0, 2, (30,))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_directions(orthogonal):
    model = MODELS[0]
    one = ss.random_direction(model)
    other = ss.random_direction(model, axis=1, like=one if orthogonal else None)
    assert one["w"].dtype == torch.complex64 and one["w"].imag.abs().min() > 0
    torch.testing.assert_close(one["w"].abs().square().sum(1), model.w.detach().abs().square().sum(1))
    surface = ss.landscape(model, DATA, F.cross_entropy, grid=3, orthogonal=orthogonal)
    assert surface.checks.filter_norm_ratio == pytest.approx(1, abs=1e-6)
    if orthogonal:
        rows = (torch.view_as_real(one["w"]) * torch.view_as_real(other["w"])).sum((1, 2))
        assert rows.abs().max() < 1e-5


@pytest.mark.parametrize("plane", [ss.solutions_plane, lambda m, *o: ss.trajectory_plane(m, list(o))], ids=["solutions", "trajectory"])  # fmt: skip
def test_planes_are_those_of_the_same_network_in_real_numbers(plane):
    others = MODELS[1:] if plane is not ss.solutions_plane else MODELS[1:3]
    found, slow = plane(MODELS[0], *others), plane(Real(MODELS[0]), *map(Real, others))
    np.testing.assert_allclose(found.coordinates, slow.coordinates, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.distances, slow.distances, atol=1e-12)
    for own, real in zip(found.directions, slow.directions):
        torch.testing.assert_close(torch.view_as_real(own["w"]), real["w"])
    options = {"grid": 5, "span": found.span(), "l2": 0.1, "strategy": "plain"}
    surface = ss.landscape(MODELS[0], DATA, F.cross_entropy, directions=found, **options)
    real = ss.landscape(Real(MODELS[0]), DATA, F.cross_entropy, directions=slow, **options)
    np.testing.assert_allclose(surface.values, real.values, rtol=1e-5)
    np.testing.assert_allclose(surface.provenance.span_in_weights, real.provenance.span_in_weights, rtol=1e-6)


def test_a_complex_direction_of_a_real_parameter_is_refused():
    with pytest.raises(ss.SkipscopeError, match=r"direction is complex[^$]*head\.weight"):
        ss.landscape(
            MODELS[0], DATA, F.cross_entropy, grid=(3,), directions=[{"head.weight": torch.ones(2, 4) * 1j}]
        )
    with pytest.raises(ss.SkipscopeError, match="not the model's"):
        ss.solutions_plane(MODELS[0], {**MODELS[0].state_dict(), "w": torch.ones(4, 3)})
