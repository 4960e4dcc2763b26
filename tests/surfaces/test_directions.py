"""Directions: Gaussian, normalised filter by filter, the same for twins; each fault of today's tools as a test."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope.surfaces import random_direction
from skipscope.surfaces.planes._directions import cosine


def _filters(weight, dimension=0):
    """Filter by filter, the slow way."""
    return [weight.select(dimension, i).flatten().double() for i in range(weight.shape[dimension])]


@given(
    shape=st.sampled_from([(5, 3), (4, 2, 3), (6, 2, 3, 3), (2, 1)]),
    seed=st.integers(0, 2**40),
    axis=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_every_filter_has_its_weights_norm(shape, seed, axis, dtype):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape).to(dtype))
    direction = random_direction(model, seed=seed, axis=axis)["weight"]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert direction.dtype == dtype
    for d, w in zip(_filters(direction), _filters(model.weight.detach())):
        assert d.norm().item() == pytest.approx(w.norm().item(), rel=tolerance)


@pytest.mark.parametrize(
    ("module", "dimension"),
    [
        (nn.Linear(4, 3), 0),
        (nn.Conv2d(2, 5, 3), 0),
        (nn.ConvTranspose2d(2, 5, 3), 1),
        (nn.Embedding(7, 3), 0),
    ],
)
def test_what_a_filter_is(module, dimension):
    direction = random_direction(module)
    assert list(direction) == ["weight"]
    for d, w in zip(_filters(direction["weight"], dimension), _filters(module.weight.detach(), dimension)):
        assert d.norm().item() == pytest.approx(w.norm().item(), rel=1e-5)


def test_biases_and_norms_do_not_move_unless_asked():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.BatchNorm1d(3))
    assert list(random_direction(model)) == ["0.weight", "1.weight"]
    assert list(random_direction(model, zero=("biases", "norms", "embeddings"))) == ["1.weight"]
    assert len(random_direction(model, zero=())) == sum(1 for _ in model.parameters())
    with pytest.raises(ss.SkipscopeError, match="no parameter is left to move"):
        random_direction(nn.BatchNorm1d(3))


@pytest.mark.parametrize("normalize", ["layer", "tensor", "none"])
def test_other_normalisations(normalize):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    d = random_direction(model, normalize=normalize, zero=())
    w = {n: p.detach() for n, p in model.named_parameters()}
    if normalize == "tensor":
        assert all(d[n].norm().item() == pytest.approx(w[n].norm().item()) for n in w)
    if normalize == "layer":
        for layer in ("0", "1"):
            sizes = [
                torch.cat([t[f"{layer}.{k}"].flatten() for k in ("weight", "bias")]).norm().item()
                for t in (d, w)
            ]
            assert sizes[0] == pytest.approx(sizes[1])
    if normalize == "none":
        assert torch.cat([t.flatten() for t in d.values()]).std().item() == pytest.approx(1, abs=0.4)


def test_axes_are_gaussian_and_nearly_orthogonal():
    """loss-landscapes draws from U[0, 1), so that two directions have cosine 0.94 (0.75 for plain uniform draws)."""
    model = reference.resnet20()
    one, two = (random_direction(model, axis=k, normalize="none") for k in (0, 1))
    draws = torch.cat([t.flatten() for t in one.values()])
    assert abs(draws.mean()) < 0.01 and abs(draws.std() - 1) < 0.01 and abs((draws**4).mean() - 3) < 0.1
    assert abs(cosine(one, two)) < 0.02
    assert abs(cosine(*(random_direction(model, axis=k) for k in (0, 1)))) < 0.02


def test_an_orthogonal_pair_keeps_its_filters_norms():
    """landscaper's helper gives "orthogonal" directions of cosine +-1."""
    model = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3)).double()
    one = random_direction(model)
    two = random_direction(model, axis=1, like=one)
    assert abs(cosine(one, two)) < 1e-14
    for name in one:
        assert torch.allclose(one[name].norm(dim=1), two[name].norm(dim=1))
    surface = ss.landscape(
        model, (torch.randn(8, 9).double(), torch.randn(8, 3).double()), F.mse_loss, grid=3, orthogonal=True
    )
    assert abs(surface.checks.axis_cosine) < 1e-14 and surface.checks.filter_norm_ratio == pytest.approx(
        1, abs=1e-12
    )


def test_filters_of_zeros_have_no_direction():
    """loss-landscapes divides by zero on a fresh ResNet's zero batch-norm biases."""
    model = reference.resnet20()
    nn.init.zeros_(model.get_parameter(next(n for n, p in model.named_parameters() if p.ndim == 4)))
    surface = ss.landscape(model, reference.digits(8), F.cross_entropy, grid=3)
    assert np.isfinite(surface.values).all() and surface.checks.passed
    assert all(torch.isfinite(t).all() for t in random_direction(model, zero=()).values())


def test_the_draw_depends_on_name_and_shape_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    half = copy.deepcopy(model).to(torch.bfloat16)
    alone = nn.Sequential(copy.deepcopy(model[0]))
    one, two, three = (random_direction(m, normalize="none") for m in (model, half, alone))
    assert torch.equal(one["0.weight"], three["0.weight"])
    assert torch.equal(one["0.weight"].to(torch.bfloat16), two["0.weight"])


def test_rescaled_filters_see_the_same_surface():
    """Li et al.: ReLU networks may be rescaled layer by layer; a filter-normalised surface must not change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight *= 4
        scaled[2].weight /= 4
    batch = torch.randn(20, 6).double(), torch.randint(3, (20,))
    surfaces = [ss.landscape(m, batch, F.cross_entropy, grid=7) for m in (model, scaled)]
    assert np.allclose(surfaces[0].values, surfaces[1].values, rtol=1e-12)
    raw = [ss.landscape(m, batch, F.cross_entropy, grid=7, normalize="none") for m in (model, scaled)]
    assert not np.allclose(raw[0].values, raw[1].values, rtol=1e-3)  # the check can fail


def test_loss_landscape_3d_fault_running_statistics_never_move():
    model = reference.resnet20()
    names = set(random_direction(model, zero=()))
    assert names == {n for n, _ in model.named_parameters()}
