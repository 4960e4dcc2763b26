"""What is drawn of a loss surface is what it is: NaN, losses below zero, a centre far below the rest, where the model is."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.report import _surface_charts, document
from skipscope.report._charts import Surface, Surfaces
from skipscope.surfaces import solutions_plane

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
AT = np.linspace(-1, 1, 21)


def _chart(values, **options):
    return Surfaces([Surface(np.asarray(values), AT, AT)], **options)


def _surface(loss, **options) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"grid": 9, "strategy": "plain", **options}
    return ss.landscape(nn.Linear(4, 3), (X, torch.zeros(20, 3)), loss, **given)


def _chart_of(surface) -> Any:
    return document(surface).panels[0].chart


def _partly_nan(output, target):
    value = F.mse_loss(output, target)
    return torch.where(value > 1.0, torch.full_like(value, float("nan")), value)


def test_losses_below_zero_have_heights_of_their_own():
    values = AT[:, None] ** 2 + AT[None] ** 2 - 1.5
    scale = _surface_charts.heights(_chart(values))
    assert not scale.log and scale(values).min() == values.min() and len(np.unique(scale(values))) > 50
    far = np.where(values > 0.2, 1e9, values)  # what explodes does not hide the rest
    assert _surface_charts.heights(_chart(far)).cut and _surface_charts.heights(_chart(far)).high < 10


def test_a_centre_far_below_the_rest_is_no_bottom_to_measure_from():
    values = AT[:, None] ** 2 + AT[None] ** 2
    values[10, 10] = 1e-30  # a network that fits its data
    scale = _surface_charts.heights(_chart(values))
    assert scale.under and not scale.cut and len(np.unique(scale(values).round(6))) > 50


def test_an_accuracy_is_drawn_on_a_linear_scale():
    values = np.tile(np.linspace(0.1, 1.0, 21), (21, 1))
    scale = _surface_charts.heights(_chart(values, linear=True))
    assert not scale.log and scale.ends() == (pytest.approx(0.1), pytest.approx(1.0))
    surface = _surface(F.mse_loss, metrics={"fit": lambda o, t: (o - t).abs().mean()})
    assert "fit" in [panel.heading.partition(" ")[0] for panel in document(surface).panels]


def test_nan_is_striped_and_counted_in_the_map(tmp_path):
    from matplotlib import pyplot

    surface = _surface(_partly_nan)
    missing = int(np.isnan(surface.values).sum())
    assert 0 < missing < 81
    drawn = _chart_of(surface).surfaces[0]
    assert f"striped: NaN at {missing} of 81 points" in drawn.note and drawn.broken.sum() == missing
    axes = surface.plot()
    assert any(patch.get_hatch() for patch in axes.patches) and f"NaN at {missing}" in axes.get_title()
    pyplot.close("all")
    whole = _surface(F.mse_loss).plot()
    assert not any(patch.get_hatch() for patch in whole.patches)
    pyplot.close("all")


def test_the_ends_of_a_line_are_drawn_though_their_values_are_nan():
    from matplotlib import pyplot

    line = _surface(_partly_nan, grid=(11,), span=3.0)
    assert np.isnan(line.values[[0, -1]]).all() and np.isfinite(line.values[5])
    axes = line.plot()
    low, high = axes.get_xlim()
    assert low <= -3 and high >= 3 and "NaN at" in axes.get_xlabel()
    pyplot.close("all")


def test_the_cross_is_where_the_model_is_also_when_the_axis_is_a_strength():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.a(x)

    torch.manual_seed(0)
    model = Residual()
    found = ss.find_shortcuts(model, X)
    surface = ss.landscape(model, (X, X), F.mse_loss, grid=5, strength=found, strategy="plain")
    assert _chart_of(surface).surfaces[0].origin == (1.0, 0.0)
    text = str(_surface_charts.contours(_chart_of(surface), 700))
    assert "shortcut strength, 0 to 1" in text and "the weights as they are" in text


def test_axes_say_their_unit_and_how_far_they_go():
    text = str(_surface_charts.contours(_chart_of(_surface(F.mse_loss, span=0.5)), 700))
    assert "random direction 1 in |w| by filter, -0.500 to 0.500" in text


def test_other_solutions_are_marked_on_a_line():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    plane = solutions_plane(a, b)
    line = ss.landscape(a, (X, torch.zeros(20, 3)), F.mse_loss, directions=plane, span=plane.span(), grid=7)
    (mark,) = _chart_of(line).marks
    assert mark.x == 1.0 and "solution 2, own loss" in mark.label


def test_no_label_is_cut_off_at_the_edge(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    solutions = [nn.Linear(4, 3) for _ in range(3)]
    plane = solutions_plane(*solutions)
    surface = ss.landscape(
        solutions[0], (X, torch.zeros(20, 3)), F.mse_loss, directions=plane, span=plane.span(), grid=7
    )
    pixels = np.asarray(Image.open(surface.save(tmp_path / "s.png")).convert("L"))
    assert (pixels[:, :3] > 250).all() and (pixels[:, -3:] > 250).all()


def test_a_difference_of_nothing_but_nan_is_told_without_a_warning(recwarn):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    nan = lambda output, target: F.mse_loss(output, target) * float("nan")  # noqa: E731
    pair = ss.paired_landscapes({"a": model, "b": model}, (X, torch.zeros(20, 3)), nan, grid=5)
    assert "nan" in " ".join(panel.caption for panel in document(pair).panels)
    assert not [w for w in recwarn if "NaN" in str(w.message)]
