"""Charts and networks as SVG and text: well-formed, inside their frame, legible from 5 layers to 500."""

from __future__ import annotations

import dataclasses
import io
import re
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from report import samples
from skipscope import SkipscopeError
from skipscope.report import (
    _arcs,
    _palette,
    _surface_charts,
    _svg,
    _svg_bars,
    _svg_heat,
    _svg_lines,
    document,
    draw,
)
from skipscope.report._arcs_text import text
from skipscope.report._charts import Arc, Bars, Heat, Lines, Network, Series, Surface, Surfaces
from skipscope.report._scale import axis, power, whole_axis
from skipscope.report._view_monitor import heat_of
from skipscope.shortcuts import KINDS

floats = st.floats(allow_nan=True, allow_infinity=True)


def parse(markup) -> ElementTree.Element:
    """As strict XML; a picture with NaN in it, or an unescaped sign, fails here."""
    markup = re.sub(r'href="data:[^"]*"', "", str(markup))
    assert "nan" not in re.sub(r"<(text|title)[^>]*>.*?</\1>|aria-label=\"[^\"]*\"", "", str(markup)).lower()
    return ElementTree.fromstring(str(markup))


def numbers(root: ElementTree.Element, name: str) -> list[float]:
    return [float(e.get(name)) for e in root.iter() if e.get(name) is not None]


# --- axes ---


@given(st.lists(floats, max_size=30), st.booleans(), st.booleans())
@example([6.011721127995604e16, 6.312308624300494e16], True, False)
@settings(max_examples=300, deadline=None)
def test_every_number_lands_inside_the_axis(values, log, zero):
    made = axis(values, 10.0, 110.0, log=log, zero=zero)
    for value in values:
        at = made(value)
        assert (at is None) == np.isnan(value)
        assert at is None or 10.0 <= at <= 110.0
    assert 1 <= len(made.ticks) <= 16
    places = [made.at(v) for v, _ in made.ticks]
    assert places == sorted(places)


@given(st.lists(st.floats(1e-30, 1e30), min_size=2, max_size=20))
def test_a_log_axis_keeps_the_order_and_puts_zero_lowest(values):
    made = axis([*values, 0.0, float("inf")], 0.0, 100.0, log=True)
    ordered = [made.at(v) for v in sorted(values)]
    assert ordered == sorted(ordered)
    assert made.at(0.0) == 0.0 < min(ordered)
    assert made.at(float("inf")) == 100.0
    assert {"0", "inf"} <= {label for _, label in made.ticks}


def test_boundaries_have_whole_numbers():
    for most in range(1, 12):
        for high in range(1, 40):
            assert all(float(v).is_integer() for v, _ in whole_axis(0, high, 0, 1, most).ticks)


def test_powers_are_written_as_people_do():
    assert [power(e) for e in (-12, -1, 0, 1, 2, 3)] == ["10⁻¹²", "0.1", "1", "10", "100", "10³"]


@given(st.lists(st.floats(0, 100), max_size=12).map(sorted))
def test_labels_are_moved_apart_in_order(wanted):
    places = _svg.spread(wanted, 5.0, 0.0, 100.0)
    assert all(b - a >= 5.0 - 1e-9 for a, b in pairwise(places))
    assert not places or places[-1] <= 100.0 + 1e-9


# --- charts ---


@pytest.mark.parametrize("width", [_svg.WIDE, _svg.NARROW])
def test_every_chart_of_every_result_is_well_formed(width):
    from skipscope.report._page import svg

    for result in samples.everything():
        for panel in document(result).panels:
            for chart in panel.charts:
                root = parse(f"<both>{svg(chart)}</both>")
                assert len(list(root.iter("svg"))) == 2


@given(st.lists(floats, min_size=1, max_size=8), st.booleans(), st.sampled_from([_svg.WIDE, _svg.NARROW]))
@settings(max_examples=100, deadline=None)
def test_lines_of_any_numbers_stay_inside_the_frame(values, log, width):
    at = list(range(len(values)))
    chart = Lines(
        [Series("a", at, values), Series("b", at, values[::-1], low=values, high=values, style=1)], log_y=log
    )
    root = parse(_svg_lines.lines(chart, width))
    _, _, wide, high = map(float, root.get("viewBox").split())
    for path in root.iter("path"):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d")):
            assert -10 <= float(x) <= wide + 10
            assert -10 <= float(y) <= high + 10


@given(st.lists(floats, min_size=1, max_size=60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_bars_of_any_numbers_are_drawn(values, log):
    labels = [f"layer.{i}" for i in range(len(values))]
    root = parse(_svg_bars.bars(Bars(labels, [values], ["cost"], log=log), _svg.WIDE))
    if len(values) > 24:
        assert f"and {len(values) - 24} more in the table" in "".join(root.itertext())


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf"), 1.0])
def test_heat_and_surfaces_of_one_value_are_drawn(fill):
    values = np.full((3, 4), fill)
    parse(_svg_heat.heat(Heat(values, list("abc"), [1, 2, 3, 4]), _svg.WIDE))
    parse(
        _surface_charts.contours(
            Surfaces([Surface(values, np.linspace(-1, 1, 3), np.linspace(-1, 1, 4), "x")]), _svg.WIDE
        )
    )
    parse(
        _surface_charts.contours(
            Surfaces([Surface(values, np.linspace(-1, 1, 3), np.linspace(-1, 1, 4), "x", signed=True)]),
            _svg.WIDE,
        )
    )


def test_one_step_of_a_history_is_drawn():
    parse(_svg_heat.heat(Heat(np.ones((2, 1)), ["a", "b"], [1]), _svg.WIDE))


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(20, 250)), max_size=25), st.integers(1, 3))
@settings(deadline=None)
def test_words_of_events_touch_neither_each_other_nor_a_line(events, rows):
    places = sorted(place for place, _ in events)
    lengths = [length for _, length in events]
    put = [
        (place, *room, room[0] + length)
        for place, length, room in zip(places, lengths, _svg.rooms(places, lengths, 0, 600, rows))
        if room
    ]
    for i, (place, start, row, end) in enumerate(put):
        assert start >= 0 and end <= 600 and row < rows
        assert start == place + 5 or end == place - 5
        for other, s, r, e in put[:i]:
            assert row != r or end < s or e < start
            assert row >= r or not s < place < e  # a line that reaches up past the words of a lower row
            assert row <= r or not start < other < end


def test_a_word_with_room_is_said_and_one_without_is_not():
    assert _svg.rooms([10], [50], 0, 100) == [(15, 0)]
    assert _svg.rooms([90], [50], 0, 100) == [(35, 0)]
    assert _svg.rooms([50], [50], 0, 100) == [None]


@pytest.mark.parametrize("width", [_svg.WIDE, _svg.NARROW])
def test_events_stand_between_the_title_and_the_map(width):
    chart = heat_of(samples.restless(), "rms")
    root = parse(_svg_heat.heat(chart, width))
    map_top = next(float(e.get("y")) for e in root.iter() if e.tag.endswith("image"))
    said = [e for e in root.iter() if e.get("class") == "note"]
    assert 2 <= len(said) < len(chart.events)
    assert len({e.get("y") for e in said}) == 2
    assert all(13 + 11 < float(e.get("y")) < map_top for e in said)
    assert sum(e.get("class") == "mark" for e in root.iter()) == len(chart.events) == 12


def pixels(values, size=(120, 80)) -> np.ndarray:
    png, _, _ = _palette.heat_png(np.asarray(values, dtype=float), size)
    return (matplotlib.image.imread(io.BytesIO(png)) * 255).round().astype(int)


def test_not_finite_is_striped_unknown_is_clear_and_zero_is_grey():
    made = pixels([[1.0, np.inf, np.nan], [0.0, 10.0, np.inf]])
    assert made.shape == (80, 120, 4)
    striped = {(0xB3, 0x12, 0x3F, 255), (0xFF, 0xD9, 0xE2, 255)}
    for row, column, colours in [
        (0, 1, striped), (1, 2, striped), (0, 2, {(0, 0, 0, 0)}), (1, 0, {(140, 140, 140, 255)}),
        (0, 0, {(68, 1, 84, 255)}), (1, 1, {(253, 231, 37, 255)}),
    ]:  # fmt: skip
        cell = made[row * 40 : row * 40 + 40, column * 40 : column * 40 + 40]
        assert set(map(tuple, cell.reshape(-1, 4).tolist())) == colours
    assert pixels([[1.0, 10.0]]).shape == (1, 2, 4)  # nothing to stripe: a pixel for each cell


def test_a_history_tells_not_finite_from_not_connected():
    chart = heat_of(samples.restless(), "rms")
    assert np.isinf(chart.values[4:8, 20:30]).all()
    assert np.isinf(chart.values).sum() == 40
    assert np.isnan(chart.values).sum() == np.isnan(chart.values[3, 7]) == 1
    assert np.isnan(samples.restless().matrix()["values"]).sum() == 41  # the history is left as it was


def test_the_whole_gradient_is_no_zero_where_it_is_not_finite():
    series = document(samples.restless()).panels[-1].chart.series[0]
    assert [step for step, y in zip(series.x, series.y) if y == np.inf] == list(range(21, 31))
    assert 0 not in series.y


def test_no_event_is_drawn_beside_the_map_and_flickering_does_not_hide_it():
    restless = samples.restless()
    assert [mark.x for mark in heat_of(restless, "flow").events] == [1, 2, 4, 6, 20, 22, 41, 42]
    one = restless.events[0]
    flickering = tuple(dataclasses.replace(one, step=1 + i * 59 / 4000) for i in range(4000))
    assert len(heat_of(dataclasses.replace(restless, events=flickering), "rms").events) <= 151


def test_events_are_told_in_sentences_the_first_and_the_last_two():
    restless = samples.restless()
    assert document(restless).answer[1:] == [
        "Step 1: from vanishing to healthy: reason 0.",
        "And 9 more, listed under the numbers.",
        "Step 59: from dead to exploding: reason 10.",
        "Step 60: from exploding to vanishing: reason 11.",
    ]
    assert document(restless).answer[0].startswith("Step 60: vanishing")
    assert [row[0] for row in document(restless).panels[0].tables[1].rows] == [
        e.step for e in restless.events
    ]
    few = dataclasses.replace(restless, events=restless.events[:3])
    assert len(document(few).answer) == 4
    assert not any("more" in sentence for sentence in document(few).answer)


def test_thinning_keeps_every_spike():
    y = np.zeros(10_000)
    y[4321] = -7.0
    kept = _svg_lines._thin([(float(i), float(v)) for i, v in enumerate(y)])
    assert len(kept) < 500
    assert (4321.0, -7.0) in kept
    assert kept[0][0] == 0.0
    assert kept[-1][0] == 9999.0


def test_a_dead_gradient_is_drawn_on_the_floor_and_not_left_out():
    root = parse(_svg_lines.lines(document(samples.flow(12, zeros=4)).panels[0].chart, _svg.WIDE))
    assert "0" in [t.text for t in root.iter("text")]


# --- surfaces ---


def test_heights_are_logs_clipped_five_decades_above_the_lowest():
    chart = Surfaces([Surface(np.array([[0.01, 1.0], [1e9, np.inf]]), np.arange(2.0), np.arange(2.0))])
    scale = _surface_charts.heights(chart)
    np.testing.assert_allclose(scale(chart.surfaces[0].values), [[-2, 0], [3, 3]])
    assert scale.cut


def test_surfaces_side_by_side_share_one_scale():
    low, high = np.full((3, 3), 0.1), np.full((3, 3), 10.0)
    at = np.arange(3.0)
    drawn = _surface_charts.payload(Surfaces([Surface(low, at, at), Surface(high, at, at)]))
    assert drawn["low"] == pytest.approx(-1, abs=0.03)
    assert drawn["high"] == pytest.approx(1, abs=0.03)
    assert drawn["surfaces"][0]["z"][0][0] == -1
    assert drawn["surfaces"][1]["z"][0][0] == 1


def test_what_is_unknown_is_a_hole_and_never_a_height():
    values = np.ones((3, 3))
    values[1, 2] = np.nan
    drawn = _surface_charts.payload(Surfaces([Surface(values, np.arange(3.0), np.arange(3.0))]))
    assert drawn["surfaces"][0]["z"][2][1] is None  # rows are the second axis there
    assert sum(v is None for row in drawn["surfaces"][0]["z"] for v in row) == 1


def test_axes_are_not_exchanged():
    a, b = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)
    values = 1 + np.abs(a)[:, None] * 10 + np.abs(b)[None] * 100
    drawn = _surface_charts.payload(Surfaces([Surface(values, a, b)]))["surfaces"][0]
    heights = np.array(drawn["z"])
    assert heights.shape == (len(drawn["y"]), len(drawn["x"]))
    # The finer grid keeps the computed points, and what is measured there.
    at_x, at_y = (np.abs(np.subtract.outer(end, drawn[axis])).argmin(1) for end, axis in ((a, "x"), (b, "y")))
    assert np.array(drawn["x"])[at_x] == pytest.approx(a, abs=1e-4)
    assert np.array(drawn["y"])[at_y] == pytest.approx(b, abs=1e-4)
    np.testing.assert_allclose(heights[np.ix_(at_y, at_x)], np.log10(values).T, atol=2e-3)


# --- the network ---

networks = st.integers(1, 120).flatmap(
    lambda n: st.builds(
        Network,
        st.just([f"l{i}" for i in range(n)]),
        st.lists(
            st.tuples(
                st.integers(0, n - 1),
                st.integers(0, n - 1),
                st.sampled_from(KINDS),
                st.none() | st.floats(0, 1),
            ).map(lambda t: Arc(min(t[:2]), max(t[:2]), "s", t[2], t[3])),
            max_size=20,
        ),
    )
)


@given(networks, st.sampled_from([320, 720]))
@settings(max_examples=80, deadline=None)
def test_any_network_is_drawn_whole(net, width):
    root = parse(_arcs.network(net, width))
    layers = [r for r in root.iter("rect") if r.get("class") == "layer"]
    assert len(layers) == len(net.layers)
    _, _, wide, high = map(float, root.get("viewBox").split())
    assert all(0 <= x <= wide for x in numbers(root, "x") if x)
    assert all(0 <= y <= high for y in numbers(root, "y") if y)
    drawn = [
        p
        for p in root.iter("path")
        if (p.get("class") or "").startswith("arc") and p.find("title") is not None
    ]
    assert len(drawn) >= len(net.arcs)


@given(networks, st.sampled_from([320, 720]))
@settings(max_examples=60, deadline=None)
def test_names_in_one_row_do_not_overlap(net, width):
    long = Network([f"encoder.block.{i}.layer.0.SelfAttention.q" for i in range(len(net.layers))], net.arcs)
    rows: dict[str, list[tuple[float, float]]] = {}
    for t in parse(_arcs.network(long, width)).iter("text"):
        if t.get("class") == "tick" and t.get("transform") is None:
            length = 6.7 * len("".join(t.itertext()))
            x = float(t.get("x")) - (length if t.get("text-anchor") == "end" else 0)
            rows.setdefault(t.get("y"), []).append((x, x + length))
    for spans in rows.values():
        assert all(b[0] > a[1] for a, b in pairwise(sorted(spans)))
        assert all(a >= 0 and b <= width for a, b in spans)


def test_what_repeats_is_told_block_by_block():
    """The first block has a layer more; still what is counted are whole blocks, and their rails go on."""
    layers, arcs = ["embed"], []
    for block in range(12):
        for part in ("attention", "mlp"):
            start = len(layers)
            layers += [f"block.{block}.{part}.{name}" for name in ("norm", "in", "out")]
            layers += ["block.0.attention.bias"] * (start == 1)
            arcs.append(Arc(start, len(layers) - 1, f"block.{block}.{part}", "identity"))
    lines = text(Network(layers, arcs), 80).splitlines()
    (more,) = [line for line in lines if "more like this" in line]
    assert more == "⋮  ⋮ 10 more like this, block.2 to block.11"
    assert len(lines) < 30


@given(networks, st.sampled_from([40, 80, 120]))
@settings(max_examples=80, deadline=None)
def test_any_network_is_written_within_the_width(net, width):
    lines = text(net, width).splitlines()
    assert max(map(len, lines)) <= max(width, 60)
    assert "input" in lines[0]


def test_a_nested_pair_in_text():
    net = Network(["a", "b", "c"], [Arc(0, 2, "outer", "concat"), Arc(1, 1, "inner", "identity", 0.25)])
    assert text(net, 60) == "\n".join([
        "╭─────● input",
        "│     ■ a",
        "│  ╭──○",
        "│  │  ■ b",
        "│  ╰──⊕ inner  identity, 25 % of the gradient",
        "│     ■ c",
        "╰─────⊕ outer  concat",
        "      ▽ output",
    ])  # fmt: skip


def test_five_hundred_layers_fit_a_screen_of_text_and_rows_of_arcs():
    found = samples.found(249, 2)
    lines = draw(found, width=80).splitlines()
    assert len(lines) < 40
    assert any("more like this" in line for line in lines)
    root = parse(draw(found, "svg").replace(' xmlns="http://www.w3.org/2000/svg"', ""))
    assert float(root.get("viewBox").split()[3]) < 900
    assert len({r.get("y") for r in root.iter("rect")}) >= 6


@pytest.mark.parametrize("sly", ["\r", "\n", "\t", "\x1b[2J", "\u2028", "\u200f", "\u061c"])
def test_a_name_in_text_moves_no_cursor_and_begins_no_line(sly):
    drawn = draw(samples.found(9, text=lambda name: sly + name), width=80)
    assert sly == "\n" or sly not in drawn
    assert len(drawn.splitlines()) == len(draw(samples.found(9), width=80).splitlines())
    assert "\N{REPLACEMENT CHARACTER}" in drawn


def test_ascii_is_ascii():
    assert draw(samples.found(9), ascii=True).isascii()


def test_thickness_is_the_share():
    thick = [_arcs.thickness(Arc(0, 1, "s", "identity", share)) for share in (0.25, 0.5, 1.0)]
    assert thick == pytest.approx([thick[2] / 4, thick[2] / 2, thick[2]])


def test_a_projection_is_no_layer_of_the_line():
    drawn = draw(samples.found(3, kinds=("projection",)))
    assert "down" not in drawn
    assert drawn.count("⊕") == 3


def test_a_drawing_is_text_at_a_prompt_and_a_picture_in_a_notebook():
    drawing = draw(samples.found(3))
    assert repr(drawing) == str(drawing)
    assert "<svg" in drawing._repr_html_()


def test_an_unknown_form_is_refused():
    with pytest.raises(SkipscopeError, match="unknown form 'pdf'"):
        draw(samples.found(3), "pdf")


def test_shares_come_from_a_split():
    found, split = samples.found(9), samples.split(9)
    assert "% of the gradient" in draw(found, shares=split)
