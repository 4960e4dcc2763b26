"""What differs between two passes at the same weights: random numbers, and tensors a model computed earlier and keeps."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
_numpy, _torch = np.random.default_rng(0), torch.Generator()


class Noisy(nn.Module):
    """Scales its output by 1 + noise / 10."""

    def __init__(self, draw):
        super().__init__()
        self.layer, self.draw, self.own = nn.Linear(6, 3), draw, np.random.default_rng(1)

    def forward(self, x):
        return self.layer(x) * (1 + float(self.draw(self)) / 10)


SEEDED = {
    "torch": lambda m: torch.randn(()), "numpy": lambda m: np.random.randn(), "python": lambda m: random.random(),
}  # fmt: skip
OWN = {"numpy": lambda m: _numpy.normal(), "torch": lambda m: torch.randn((), generator=_torch)}


@pytest.mark.parametrize("name", SEEDED)
def test_noise_of_a_global_generator_is_the_same_at_every_point(name):
    torch.manual_seed(0)
    model, still = Noisy(SEEDED[name]), {"layer.weight": torch.zeros(3, 6)}
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    surface = ss.landscape(model, (X, Y), F.cross_entropy, grid=3, directions=[still, still])
    assert np.ptp(surface.values) == 0 and surface.checks.passed
    after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()
    assert (after[0] == before[0]).all() and after[1] == before[1] and torch.equal(after[2], before[2])


@pytest.mark.parametrize(
    "call", [ss.landscape, ss.extreme_eigenvalues, ss.curvature_map], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", OWN)
def test_noise_of_another_generator_is_refused_with_the_cure(name, call):
    more = {} if call is ss.extreme_eigenvalues else {"grid": 3}
    with pytest.raises(
        ss.SkipscopeError, match=r"two values at the same weights[^$]*generator of its own[^$]*seed"
    ):
        call(Noisy(OWN[name]), (X, Y), F.cross_entropy, **more)


def test_noise_of_a_generator_that_the_model_holds():
    model = Noisy(lambda m: m.own.normal())
    with pytest.raises(ss.SkipscopeError, match="two values at the same weights"):
        ss.landscape(model, (X, Y), F.cross_entropy, grid=3)
    assert ss.extreme_eigenvalues(
        model, (X, Y), F.cross_entropy
    ).converged  # every pass begins at the same state


class UnitWeight(nn.Module):
    """x w' / |w|; in evaluation mode the divided weight is kept in an attribute or a dict."""

    def __init__(self, where):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.where, self.kept, self.cache = nn.Parameter(torch.randn(3, 6)), where, None, {}
        self.register_buffer("held", None)

    def forward(self, x):
        divided = self.weight / self.weight.norm() if self.training else self._cached()
        return x @ divided.T

    def _cached(self):
        if self.where == "dict":
            if not self.cache:
                self.cache["w"] = (self.weight / self.weight.norm()).detach()
            return self.cache["w"]
        name = "kept" if self.where == "attribute" else "held"
        if getattr(self, name) is None:
            setattr(self, name, (self.weight / self.weight.norm()).detach())
        return getattr(self, name)


@pytest.mark.parametrize("where", ["attribute", "dict", "buffer"])
def test_a_cache_that_was_empty_is_computed_at_every_point(where):
    cached, plain = UnitWeight(where).eval(), UnitWeight(where).eval()
    plain.__class__ = type(
        "Plain", (UnitWeight,), {"forward": lambda m, x: x @ (m.weight / m.weight.norm()).T}
    )
    found = ss.landscape(cached, (X, Y), F.cross_entropy, grid=3, normalize="none")
    slow = ss.landscape(plain, (X, Y), F.cross_entropy, grid=3, normalize="none", strategy="plain")
    np.testing.assert_allclose(found.values, slow.values, rtol=1e-6)
    assert np.ptp(found.values) > 0.01 and cached.kept is None and not cached.cache and cached.held is None


@pytest.mark.parametrize("call", [ss.landscape, ss.extreme_eigenvalues], ids=lambda f: f.__name__)
def test_a_full_cache_is_refused(call):
    model = UnitWeight("attribute").eval()
    model(X)
    with pytest.raises(ss.SkipscopeError, match=r"does not read this weight[^$]*layer: +weight[^$]*kept"):
        call(model, (X, Y), F.cross_entropy)


def test_a_constant_that_a_module_holds_is_no_cache():
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].scale = torch.ones(3)
    assert ss.landscape(model, (X, Y), F.cross_entropy, grid=3).checks.passed
    assert ss.extreme_eigenvalues(model, (X, Y), F.cross_entropy).converged


@ss.objective
def pinn(model, x):
    x = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().mean()


def test_a_loss_that_differentiates_has_a_surface():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    surface = ss.landscape(model, X, pinn, grid=3)
    direction = [ss.random_direction(model, axis=axis) for axis in (0, 1)]
    moved = {
        n: p.detach() - direction[0].get(n, 0) - direction[1].get(n, 0) for n, p in model.named_parameters()
    }
    corner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    corner.load_state_dict(moved)
    assert surface.values[0, 0] == pytest.approx(float(pinn(corner, X).detach()), rel=1e-5)
    halves = ss.batches([X[:25], X[25:]])
    assert ss.landscape(model, halves, pinn, grid=3).values == pytest.approx(surface.values, rel=1e-5)
    mapped = ss.curvature_map(model, halves, pinn, grid=3)
    assert mapped.largest[1, 1] == pytest.approx(ss.extreme_eigenvalues(model, X, pinn).largest[0], rel=1e-2)
