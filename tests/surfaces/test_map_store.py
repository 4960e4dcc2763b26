"""Whose numbers a curvature map's store holds; and what parameters= chooses, on surfaces and maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, (torch.randn(48, 6), torch.randint(0, 3, (48,))), torch.randn(6, 6) / 3


def capped(most):
    def loss(output, target):
        return F.cross_entropy(output, target).clamp(max=most)

    return loss


def mapped(model, data, store, loss=F.cross_entropy, **options):
    return ss.curvature_map(model, data, loss, grid=(5,), store=store, **options)


def test_a_direction_of_another_layer(problem, tmp_path):
    model, data, step = problem
    mapped(model, data, tmp_path / "s", directions=[{"0.weight": step}])
    with pytest.raises(ss.SkipscopeError, match="made with other directions"):
        mapped(model, data, tmp_path / "s", directions=[{"2.weight": step}])
    with pytest.raises(ss.SkipscopeError, match="made with other directions"):
        first = ss.landscape(
            model, data, F.cross_entropy, grid=(3,), store=tmp_path / "l", directions=[{"0.weight": step}]
        )
        assert first.checks.passed
        ss.landscape(
            model, data, F.cross_entropy, grid=(3,), store=tmp_path / "l", directions=[{"2.weight": step}]
        )


def test_another_loss_of_the_same_name(problem, tmp_path):
    model, data, _ = problem
    mapped(model, data, tmp_path / "s", capped(9.0), span=3.0)
    with pytest.raises(ss.SkipscopeError, match="made with other loss away from the origin"):
        mapped(model, data, tmp_path / "s", capped(1.6), span=3.0)


def test_layers_that_were_frozen_since(problem, tmp_path):
    model, data, _ = problem
    mapped(model, data, tmp_path / "s")
    model[0].requires_grad_(False)
    with pytest.raises(ss.SkipscopeError, match="made with other parameters"):
        mapped(model, data, tmp_path / "s")
    again = mapped(model, data, tmp_path / "t")
    np.testing.assert_array_equal(mapped(model, data, tmp_path / "t").largest, again.largest)


def test_another_loss_of_the_same_value(problem, tmp_path):
    """The curvature itself is compared: these two losses have the same values everywhere."""
    model, data, _ = problem

    def loss(output, target):
        return F.cross_entropy(output, target)

    mapped(model, data, tmp_path / "s", loss)

    def loss(output, target):
        return F.cross_entropy(output, target).detach() + 0 * output.square().mean()

    with pytest.raises(ss.SkipscopeError, match="made with other curvature at the origin"):
        mapped(model, data, tmp_path / "s", loss)


# --- parameters= ---


def test_a_surface_of_one_layer(problem):
    model, data, _ = problem
    surface = ss.landscape(model, data, F.cross_entropy, grid=3, parameters="2.*", strategy="plain")
    whole = [ss.random_direction(model, axis=axis) for axis in (0, 1)]
    own = [{"2.weight": direction["2.weight"]} for direction in whole]
    slow = ss.landscape(model, data, F.cross_entropy, grid=3, directions=own, strategy="plain")
    np.testing.assert_array_equal(surface.values, slow.values)
    assert np.ptp(surface.values) > 0


def test_a_map_of_one_layer(problem):
    model, data, _ = problem
    found = ss.curvature_map(model, data, F.cross_entropy, grid=3, parameters=["4.weight"])
    ends = ss.extreme_eigenvalues(model, data, F.cross_entropy, parameters="4.weight", tol=1e-6)
    assert found.parameters == 18
    assert found.largest[1, 1] == pytest.approx(ends.largest[0], rel=1e-2)


@pytest.mark.parametrize("call", [ss.landscape, ss.curvature_map], ids=lambda f: f.__name__)
def test_parameters_that_do_not_exist(problem, call):
    model, data, step = problem
    with pytest.raises(ss.SkipscopeError, match=r"no parameter is called 'head\.\*'[^$]*0\.weight"):
        call(model, data, F.cross_entropy, grid=3, parameters="head.*")
    with pytest.raises(ss.SkipscopeError, match="directions were given"):
        call(model, data, F.cross_entropy, grid=(3,), parameters="0.*", directions=[{"0.weight": step}])
    with pytest.raises(ss.SkipscopeError, match="parameters= cannot be used"):
        call(model, data, F.cross_entropy, grid=3, parameters=[])


def test_an_option_that_does_not_exist(problem):
    model, data, _ = problem
    with pytest.raises(
        TypeError, match=r"landscape\(\) got an unexpected keyword argument 'gird'. Did you mean 'grid'"
    ):
        ss.landscape(model, data, F.cross_entropy, gird=3)
    with pytest.raises(
        TypeError, match=r"paired_landscapes\(\) got an unexpected keyword argument 'strength'"
    ):
        ss.paired_landscapes({"a": model}, data, F.cross_entropy, strength=[])
