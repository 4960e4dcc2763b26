"""Options of a picture: style, size, title, notes, legend, one scale for several axes, 3-D axes of one's own."""

import matplotlib

matplotlib.use("Agg")

import inspect

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope._errors import SkipscopeError


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def surface_of(scale: float):
    torch.manual_seed(0)
    batch = torch.randn(12, 4), torch.randn(12, 1)
    with torch.no_grad():
        model = nn.Linear(4, 1)
        model.weight.mul_(scale)
    return ss.landscape(model, batch, nn.functional.mse_loss, grid=5, strategy="plain")


@pytest.fixture(scope="module")
def small():
    return surface_of(1.0)


@pytest.fixture(scope="module")
def large():
    return surface_of(9.0)


def test_paper_is_a_context_manager_and_a_call(small):
    size = matplotlib.rcParams["font.size"]
    with ss.style("paper"):
        ax = small.plot()
        assert ax.figure.get_figwidth() == pytest.approx(3.3)
        assert ax.yaxis.label.get_fontfamily() == ["serif"]
    assert matplotlib.rcParams["font.size"] == size
    assert small.plot().figure.get_figwidth() > 3.5
    try:
        ss.style("paper")
        assert small.plot().figure.get_figwidth() == pytest.approx(3.3)
    finally:
        ss.style("default")
    assert small.plot().figure.get_figwidth() > 3.5
    with pytest.raises(SkipscopeError, match="'default' or 'paper'"):
        ss.style("papyrus")


def test_size_title_notes_and_legend(small, tmp_path):
    ax = small.plot(figsize=(3.0, 2.5), title="a plane of $w$", legend=False)
    assert ax.figure.get_size_inches().tolist() == [3.0, 2.5]
    assert ax.get_title() == r"a plane of \$w\$"
    assert len(ax.figure.axes) == 1  # no bar of colours
    saved = small.save(tmp_path / "x.svg", figsize=(3.0, 2.5))
    assert b'width="216pt" height="180pt"' in saved.read_bytes()
    with pytest.raises(SkipscopeError, match="set_size_inches"):
        small.plot(ax=ax, figsize=(3, 2))
    with pytest.raises(SkipscopeError, match=r"(?s)not drawn with these options.*figsize, title, notes"):
        small.plot(colour="red")


def test_notes_under_a_flow_can_be_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    flow = ss.gradient_flow(model, (torch.randn(8, 4), torch.randn(8, 4)), nn.functional.mse_loss)
    assert "\n" in flow.plot().get_xlabel()
    ax = flow.plot(notes=False)
    assert "\n" not in ax.get_xlabel()
    flow.plot(ax=ax, notes=False)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(names) == len(set(names)) == 2
    with pytest.raises(SkipscopeError, match=r"(?s)line is not drawn into 3-D axes.*add_subplot"):
        flow.plot(ax=plt.figure().add_subplot(projection="3d"))


def test_several_axes_share_one_scale(small, large):
    left, right = plt.subplots(1, 2)[1]
    small.plot(ax=left, limits=[large])
    large.plot(ax=right, limits=[small])
    assert left.collections[0].get_clim() == right.collections[0].get_clim()
    alone = small.plot().collections[0].get_clim()
    assert left.collections[0].get_clim() != alone
    fixed = small.plot(limits=(0.01, 100.0)).collections[0].get_clim()
    assert np.allclose(fixed, (-2, 2), atol=1e-6)
    with pytest.raises(SkipscopeError, match=r"(?s)limits= cannot be used.*low, high"):
        small.plot(limits=(2.0, 1.0))


def test_twins_are_drawn_into_axes_of_ones_own(small, large):
    pair = ss.paired_landscapes(
        {"one": nn.Linear(4, 1), "other": nn.Linear(4, 1)},
        (torch.randn(12, 4), torch.randn(12, 1)), nn.functional.mse_loss, grid=4, strategy="plain",
    )  # fmt: skip
    axes = plt.subplots(1, 2)[1]
    drawn = pair.plot(ax=axes)
    assert [ax.get_title().split("\n")[0] for ax in drawn] == ["one", "other"]


def test_three_dimensional_axes_of_ones_own(small):
    solid = plt.figure().add_subplot(projection="3d")
    assert small.plot(ax=solid) is solid
    assert small.plot(ax=solid, kind="3d") is solid
    with pytest.raises(SkipscopeError, match="leave kind= out"):
        small.plot(ax=solid, kind="contour")
    with pytest.raises(SkipscopeError, match='projection="3d"'):
        small.plot(ax=plt.subplots()[1], kind="3d")


def test_the_docstring_names_every_option():
    from skipscope import report

    own = [p.name for p in inspect.signature(report.plot).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {"figsize", "title", "notes", "legend", "limits"} <= set(own)
    for name in [*own, "label", "kind", "most"]:
        assert f"            {name}: " in (ss.Result.plot.__doc__ or ""), name
