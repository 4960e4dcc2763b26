"""Scores of surfaces whose shape is known, and their error bars against repeated sampling."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipscope as ss
from skipscope.surfaces._scores import barrier, convexity_share, label_of, level_for, roughness, width

AT = np.linspace(-1, 1, 41)
A, B = np.meshgrid(AT, AT, indexing="ij")
NONE = np.zeros(0)


@given(
    st.floats(0.01, 50), st.floats(0.01, 50), st.floats(-0.95, 0.95), st.floats(-5, 5), st.floats(1e-3, 1e3)
)
@settings(max_examples=60, deadline=None)
def test_a_bowl_is_convex_smooth_and_has_one_valley(p, q, skew, height, scale):
    bowl = scale * (p * A**2 + q * B**2 + 2 * skew * np.sqrt(p * q) * A * B) + height
    assert convexity_share(bowl, AT, AT) == 1
    assert roughness(bowl) == pytest.approx(0, abs=1e-9)
    # A valley narrower than the grid and askew breaks into pools between grid points: no barrier is promised there.
    if abs(skew) < 0.5 and 0.25 < p / q < 4:
        assert barrier(bowl) == pytest.approx(0, abs=1e-9 * scale * 100)
    assert convexity_share(-bowl, AT, AT) == 0


def test_a_saddle_is_nowhere_convex_and_half_a_wave_is_half_convex():
    assert convexity_share(A**2 - B**2, AT, AT) == 0
    assert (
        convexity_share(A * B, AT, AT) == 0
    )  # its second differences along the axes vanish: the mixed one counts
    wave = np.linspace(0, 2 * np.pi, 401)
    assert convexity_share(np.sin(wave), wave, NONE) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("periods", [1, 3, 10])
def test_roughness_of_a_wave(periods):
    """cos over n periods from crest to crest moves by 4n and one valley needs 4: 1 - 1/n of it is rough."""
    line = np.cos(np.linspace(0, 2 * np.pi * periods, 200 * periods + 1))
    assert roughness(line) == pytest.approx(1 - 1 / periods, abs=1e-3)


def test_roughness_of_noise_is_near_one_and_of_a_plateau_zero():
    assert roughness(np.random.default_rng(0).normal(size=(41, 41))) > 0.9
    assert roughness(np.tanh(20 * (A**2 + B**2))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("depth", [0.1, 0.5])
def test_the_barrier_between_two_valleys(depth):
    """-exp around (-.5, 0) at depth 1 and around (.5, 0) at ``depth``: the climb out of the shallow one is its depth."""
    two = -np.exp(-40 * ((A + 0.5) ** 2 + B**2)) - depth * np.exp(-40 * ((A - 0.5) ** 2 + B**2))
    assert barrier(two) == pytest.approx(depth, rel=0.02)
    line = np.array([0.0, 3.0, 1.0, 5.0, -1.0])
    assert barrier(line) == 5.0  # from 0.0 the way to -1.0 goes over 5.0; from 1.0 it is a climb of 2.0


def test_the_barrier_by_brute_force():
    """For each valley: the lowest level at which its region holds a deeper one."""
    from scipy.ndimage import label

    values = np.random.default_rng(1).integers(0, 50, size=(7, 7)) + np.random.default_rng(2).random((7, 7))
    best = 0.0
    for place in np.ndindex(7, 7):
        for level in np.sort(values[values >= values[place]]):
            regions, _ = label(values <= level, structure=np.ones((3, 3)))
            if values[regions == regions[place]].min() < values[place]:
                best = max(best, level - values[place])
                break
    # A point that is no valley has a deeper neighbour at its own level, a climb of nothing.
    assert barrier(values) == pytest.approx(best)


def test_the_width_of_a_disc():
    radius, bound = width(A**2 + B**2, AT, AT, 0.5**2)
    assert radius == pytest.approx(0.5, rel=0.02) and not bound
    assert width(A**2 + B**2, AT, AT, 4.0)[1]
    assert np.isnan(width(1 + A**2, AT, AT, 0.5)[0])
    assert width(AT**2, AT, NONE, 0.25)[0] == pytest.approx(0.5, abs=0.026)
    far = np.minimum(A**2 + B**2, (A - 0.9) ** 2 + (B - 0.9) ** 2)  # a second region does not count
    assert width(far, AT, AT, 0.04)[0] == pytest.approx(0.2, rel=0.1)


def test_nothing_finite_breaks_no_score():
    for values in (np.full((5, 5), np.nan), np.full((5, 5), np.inf), np.where(A[:5, :5] > -2, np.nan, 1)):
        assert (
            barrier(values) == 0
            and roughness(values) == 0
            and np.isnan(convexity_share(values, AT[:5], AT[:5]))
        )
        assert "finite" in label_of(values, float("nan"), None) and np.isnan(
            level_for([(float("nan"), values)])
        )
    hole = np.where((A > 0.5) & (B > 0.5), np.nan, A**2 + B**2)
    assert convexity_share(hole, AT, AT) == 1 and roughness(hole) == 0 and barrier(hole) == 0


def test_labels():
    bowl = 2 + A**2
    assert label_of(bowl, 2.0, True) == "" and label_of(bowl, 2.0, False).startswith("not flat, but")
    sheet = 2.3 + 0.01 * A
    assert label_of(sheet, 2.3, False) == "flat: this network has not learnt" == label_of(sheet, 2.3, None)
    assert label_of(sheet, 2.3, True) == "flat over this span: widen it"


def test_jackknife_errors_cover_what_other_samples_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(12000, 4).double()
    y = model(x).detach() + 0.5 * torch.randn(12000, 1).double()
    found = [
        ss.landscape(model, (part, target), F.mse_loss, grid=9, strategy="plain")
        for part, target in zip(x.split(400), y.split(400))
    ]
    spread = np.std([s.scores.centre for s in found], ddof=1)
    said = np.median([s.scores.errors["centre"] for s in found])
    assert said == pytest.approx(spread, rel=0.4)
    widths = np.array([ss_.scores.width for ss_ in found])
    assert np.median([s.scores.errors["width"] for s in found]) < 10 * np.std(widths) + 0.05
