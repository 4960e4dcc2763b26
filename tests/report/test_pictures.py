"""Pictures by matplotlib: every chart of every result, into given axes, into files, without a trace."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from report import samples
from skipscope import SkipscopeError
from skipscope.report import document

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = samples.everything()
NAMES = [type(r).__name__ for r in RESULTS]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


@pytest.mark.parametrize("result", RESULTS, ids=NAMES)
def test_every_chart_is_drawn_into_given_axes(result):
    for number in range(sum(len(p.charts) for p in document(result).panels)):
        _, ax = plt.subplots()
        assert result.plot(ax=ax, chart=number) is ax
        assert ax.has_data()
        plt.close("all")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_files_are_pictures_leave_no_figure_and_are_the_same_again(ending, tmp_path):
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for result in (samples.flow(), samples.pair(points=7)):
        first = result.save(tmp_path / f"a.{ending}").read_bytes()
        assert first.startswith(starts[ending])
        assert first == result.save(tmp_path / f"b.{ending}").read_bytes()
    assert plt.get_fignums() == []


def test_a_comparison_is_one_picture(tmp_path):
    assert samples.comparison(points=7).save(tmp_path / "a.png", dpi=40).stat().st_size > 8_000
    assert len(samples.comparison(points=7).plot()) == 4


def test_several_results_share_axes_each_in_its_own_style_with_its_own_verdict():
    ax = samples.flow().plot(label="plain")
    samples.flow(slope=0.0, state="healthy").plot(ax=ax, label="with")
    lines = [line for line in ax.get_lines() if line.get_gid() == "skipscope"]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 2
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain", "with"]
    assert "plain: vanishing" in ax.get_xlabel()
    assert "with: healthy" in ax.get_xlabel()
    assert ax.get_yscale() == "log"


def test_the_numbers_drawn_are_the_result_s():
    flow = samples.flow(9)
    line = flow.plot().get_lines()[0]
    np.testing.assert_array_equal(line.get_ydata(), [b.gradient_rms for b in flow.boundaries])
    np.testing.assert_array_equal(line.get_xdata(), [b.depth for b in flow.boundaries])


def test_words_of_events_do_not_overlap_and_what_is_not_finite_is_striped():
    ax = samples.restless().plot()
    ax.figure.draw_without_rendering()
    said = [t.get_window_extent() for t in ax.texts]
    assert len(said) >= 3
    assert len({round(box.y0) for box in said}) == 2
    assert not any(a.overlaps(b) for i, a in enumerate(said) for b in said[:i])
    frame = ax.get_window_extent()
    assert all(box.y0 >= frame.y1 and frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in said)
    striped = [c for c in ax.collections if c.get_hatch()]
    bars = [path.get_extents() for c in striped for path in c.get_paths()]
    assert [(b.x0, b.x1, b.y0) for b in bars] == [(20.5, 30.5, row) for row in range(4, 8)]


def test_surfaces_in_three_dimensions_share_their_heights():
    axes = samples.pair(points=9).plot(kind="3d")
    assert len(axes) == 2
    assert axes[0].get_zlim() == axes[1].get_zlim()


def test_a_trajectory_becomes_an_animation(tmp_path):
    from PIL import Image

    with Image.open(samples.trajectory().save(tmp_path / "walk.gif", dpi=40)) as picture:
        assert picture.n_frames == 5
    with pytest.raises(SkipscopeError, match="known weights"):
        samples.surface().save(tmp_path / "none.gif")


def test_names_are_not_read_as_mathematics(tmp_path):
    samples.flow(text=lambda s: s + r"$\frac{").save(tmp_path / "x.png")
    samples.importance(text=lambda s: s + "$x_").save(tmp_path / "y.png")


@pytest.mark.parametrize("sly", ["\x00", "\x0b", "\x1b[2J", "\x9b", "\ud83d", "\ufffe", "\u202e", "\r", "\t"])
def test_a_picture_holds_no_control_character_and_opens(sly, tmp_path):
    for result in (samples.flow(text=lambda text: sly + text), samples.pair(lambda text: sly + text, 5)):
        text = result.save(tmp_path / "x.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert sly not in text


def test_names_are_no_commands_where_matplotlib_draws_by_latex():
    with matplotlib.rc_context({"text.usetex": True}):
        ax = samples.importance(text=lambda text: "\\input{x}_%" + text).plot(ax=plt.figure().add_subplot())
        names = [label.get_text() for label in ax.get_yticklabels()]
    assert names and all(name.startswith(r"\textbackslash{}input\{x\}\_\%") for name in names)


def test_what_cannot_be_drawn_is_refused_with_the_cure():
    with pytest.raises(SkipscopeError, match="no chart number 9"):
        samples.flow().plot(chart=9)
    with pytest.raises(SkipscopeError, match="a result with a chart"):
        samples.surface().checks.plot()
    with pytest.raises(SkipscopeError, match="not drawn with these options"):
        samples.flow().plot(kind="3d")
    with pytest.raises(SkipscopeError, match=r"not saved as \.gif"):
        samples.flow().save("x.gif")


@pytest.mark.slow
def test_pages_need_no_pyplot(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, {!r}); import samples; samples.flow().save({!r});"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot'"
    ).format(str(samples.__file__.rsplit("/", 1)[0]), str(tmp_path / "x.html"))
    subprocess.run([sys.executable, "-c", code], check=True)
