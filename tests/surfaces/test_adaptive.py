"""Adaptive grids: few points where the surface is smooth, every point where it is not, and no lie about which."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope.surfaces.grids import _adaptive_grid
from skipscope.surfaces.grids._adaptive_grid import Adaptive, _levels, beyond
from skipscope.surfaces.grids._grid import Sheet


def _fill(function, n, tolerance, m=None):
    axes = np.linspace(-1, 1, n), np.linspace(-1, 1, m or n)
    truth = function(*np.meshgrid(*axes, indexing="ij"))
    sheet, asked = Sheet(["value"], truth.shape), []

    def compute(points):
        asked.append(points)
        new = points[~sheet.done[points]]
        sheet.put(new, truth.ravel()[new][None])

    errors = Adaptive(sheet, axes, compute, [("value", None)], tolerance).run()
    return truth, sheet, errors["value"]


SMOOTH = {
    "bowl": lambda a, b: a**2 + 3 * b**2,
    "quartic": lambda a, b: (a**2 + b**2 + a * b) ** 2,
    "steep in decades": lambda a, b: np.exp(6 * (a**2 + b**2)),
    "waves": lambda a, b: np.sin(3 * a) * np.cos(2 * b),
    "plateau": lambda a, b: np.tanh(4 * (a**2 + b**2)),
}


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize(("n", "m"), [(51, 51), (33, 50)])
def test_smooth_surfaces_take_few_points(kind, n, m):
    truth, sheet, error = _fill(SMOOTH[kind], n, 0.01, m)
    worst = np.abs(sheet["value"] - truth).max() / np.ptp(truth)
    assert worst <= 0.015 and error <= 0.01 * np.ptp(truth)
    assert sheet.done.mean() < 0.15
    assert np.array_equal(sheet["value"].ravel()[sheet.done], truth.ravel()[sheet.done])


def test_a_chaotic_surface_ends_as_the_full_grid():
    noise = np.random.default_rng(0).normal(size=(31, 31))
    truth, sheet, error = _fill(lambda a, b: noise, 31, 0.01)
    assert sheet.done.all() and np.array_equal(sheet["value"], truth) and error == 0


CHAOTIC = {
    "fine ripples": lambda a, b: a**2 + b**2 + 0.3 * np.sin(60 * a) * np.sin(57 * b),
    "a checkerboard": lambda a, b: a**2 + 0.2 * (np.arange(a.size).reshape(a.shape) % 2),
    "noise on a bowl": lambda a, b: a**2 + b**2 + 0.2 * np.random.default_rng(1).normal(size=a.shape),
    "some points in seven": lambda a, b: a**2 + (np.random.default_rng(2).random(a.shape) < 1 / 7),
}


@pytest.mark.parametrize("kind", CHAOTIC)
def test_chaos_at_any_scale_ends_as_the_full_grid(kind):
    truth, sheet, error = _fill(CHAOTIC[kind], 51, 0.01)
    assert sheet.done.mean() > 0.99 and np.abs(sheet["value"] - truth).max() <= 0.01 * np.ptp(truth)
    assert error <= 0.01 * np.ptp(truth)


def test_what_the_largest_error_seen_bounds():
    """Of 500 points k are further off than all drawn: in at most 5 of 100 draws k is more than said."""
    generator, wrong = np.random.default_rng(0), []
    for _ in range(2000):
        errors = generator.permutation(500)
        drawn, rest = errors[:24], errors[24:]
        wrong.append((rest > drawn.max()).mean() > beyond(24, 500))
    assert 0.03 <= np.mean(wrong) <= 0.055
    # Many points: 1 - 0.05^(1/n); more draws, of which the last is kept, say less; all drawn says all.
    assert beyond(24, 10**6) == pytest.approx(1 - 0.05 ** (1 / 24), rel=1e-3)
    assert beyond(24, 500, draws=3) > beyond(24, 500) > beyond(48, 500) and beyond(30, 30) == 0


def test_a_draw_that_fails_is_followed_by_a_larger_one():
    """A tenth of the points is off by 3 % and lies where no cell is tested."""
    bad = np.random.default_rng(3).random((51, 51)) < 0.1
    _, sheet, error = _fill(lambda a, b: a**2 + b**2 + 0.06 * bad, 51, 0.01)
    assert sheet.done.mean() > 0.5 and error <= 0.01 * 2.06


def test_after_a_draw_that_fails_twice_as_many_are_drawn(monkeypatch):
    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(_adaptive_grid, "beyond", lambda *counts: drawn.append(counts) or beyond(*counts))
    for seed in range(6):
        bad = np.random.default_rng(seed).random((51, 51)) < 0.03
        _fill(lambda a, b: a**2 + b**2 + 0.06 * bad, 51, 0.01)
    assert all(held == min(24 * 2 ** (draws - 1), left) for held, left, draws in drawn)
    assert max(draws for _, _, draws in drawn) > 1


def test_half_chaotic_is_computed_in_that_half():
    noise = np.random.default_rng(0).normal(size=(51, 51))
    truth, sheet, _ = _fill(lambda a, b: a**2 + np.where(b > 0.4, noise, 0), 51, 0.01)
    done = sheet.done.reshape(51, 51)
    assert done[:, 36:].mean() > 0.95 and done[:, :25].mean() < 0.6
    assert np.abs(sheet["value"] - truth).max() <= 0.02 * np.ptp(truth)


def test_a_narrow_spike_between_coarse_points_is_not_promised_but_nan_and_inf_are_never_smoothed():
    def hole(a, b):
        v = a**2 + b**2
        v[a + b > 0.9] = np.nan
        v[a + b > 1.4] = np.inf
        return v

    truth, sheet, _ = _fill(hole, 51, 0.01)
    computed = sheet.done.reshape(51, 51)
    assert computed[~np.isfinite(truth)].mean() > 0.9
    assert np.array_equal(sheet["value"][computed], truth[computed], equal_nan=True)


@given(st.integers(2, 200))
@settings(max_examples=60, deadline=None)
def test_levels_are_nested_and_end_with_all(n):
    levels = _levels(n)
    assert np.array_equal(levels[-1], np.arange(n))
    assert all(set(a) <= set(b) for a, b in pairwise(levels))
    assert n % 2 == 0 or n < 3 or all(n // 2 in level for level in levels)


def test_a_networks_surface_within_the_tolerance():
    torch.manual_seed(0)
    model = reference.deep_mlp(depth=4, shortcut="identity")
    batch = reference.digits(64)
    full = ss.landscape(model, batch, F.cross_entropy, grid=31, strategy="plain")
    part = ss.landscape(model, batch, F.cross_entropy, grid=31, strategy="plain", tolerance=0.01)
    assert part.computed.mean() < 0.5 and part.complete and full.complete
    assert np.array_equal(part.values[part.computed], full.values[part.computed])
    assert np.abs(part.values - full.values).max() <= 0.015 * np.ptp(full.values)
    assert part.interpolation_error <= 0.01 * np.ptp(full.values) or (
        part.interpolation_error <= np.nanmax(part.stderr)
    )
    assert (
        part.held_out >= 24
        and part.beyond == pytest.approx(beyond(24, 961 - 100), abs=0.01)
        and full.beyond is None
    )
    words = " ".join(str(part).split())
    assert f"{part.held_out} points drawn at random" in words and "95 % confidence" in words
    assert "interpolated" in str(part) and full.interpolation_error is None


def trained(depth, shortcut, steps):
    torch.manual_seed(0)
    model, batch = reference.deep_mlp(depth=depth, shortcut=shortcut), reference.digits(100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model, batch


@pytest.mark.parametrize("tolerance", [0.03, 0.01])
@pytest.mark.parametrize("net", [(4, None, 100), (8, "identity", 60)], ids=str)
def test_scores_say_what_interpolation_adds(net, tolerance):
    """Splines ripple between their points: the convexity share is off by more than the samples' error."""
    model, batch = trained(*net)
    full, part = (
        ss.landscape(model, batch, F.cross_entropy, grid=51, strategy="plain", tolerance=t)
        for t in (None, tolerance)
    )
    assert part.computed.mean() < 0.2 and part.values.min() >= 0
    for score in ("convexity_share", "roughness", "barrier", "width"):
        gap = abs(getattr(part.scores, score) - getattr(full.scores, score))
        assert gap <= 2 * part.scores.errors[score] + 1e-3, score
    assert part.interpolation_error_share == pytest.approx(part.interpolation_error / np.ptp(part.values))
    assert "% of the range" in " ".join(str(part).split())


def test_a_tolerance_of_nothing_is_refused():
    with pytest.raises(ss.SkipscopeError, match="tolerance= cannot be used"):
        ss.landscape(nn.Linear(2, 2), (torch.ones(2, 2), torch.ones(2, 2)), F.mse_loss, grid=9, tolerance=0)
