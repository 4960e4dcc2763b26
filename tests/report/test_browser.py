"""The page in a real browser: nothing leaves, nothing breaks, nothing hostile runs, it fits a phone and prints."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from report import samples
from report.browser import CHROMIUM, Browser
from report.payloads import PAYLOADS
from skipscope.report import _page, draw

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return samples.comparison(points=15).save(tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_opens_offline_without_complaint_and_says_the_answer(browser, report):
    page = browser.open(report)
    assert page.show_surfaces() == 3  # two of the result, and the precomputed one
    assert page.run("document.querySelectorAll('.scenes canvas').length") >= 6
    answer = page.run("document.querySelector('#answer').textContent")
    for sentence in samples.comparison(points=5).summary:
        assert sentence in " ".join(answer.split())
    # The answer stands above everything else, on the first screen
    assert page.run("document.querySelector('#answer').getBoundingClientRect().bottom + scrollY") < 900
    assert page.requests == []
    assert page.complaints == []


def test_the_checks_of_the_browser_can_fail(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<title>x</title><img src='other.png'><script>console.error('no'); undefined_thing()</script>"
    )
    page = browser.open(bad)
    assert any("other.png" in url for url in page.requests)
    assert len(page.complaints) >= 2


def test_turning_one_surface_turns_its_neighbour(browser, tmp_path):
    page = browser.open(samples.pair(points=9).save(tmp_path / "pair.html"))
    page.show_surfaces()
    camera = "document.querySelectorAll('.canvas canvas')[{}].dataset.camera"
    before = page.run(camera.format(1))
    x, y = page.run(
        "(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('.canvas').getBoundingClientRect())"
    )
    page.drag(x, y, x + 90, y)
    page.wait(f"{camera.format(1)} !== '{before}'")
    page.wait(f"{camera.format(0)} === {camera.format(1)}")
    assert page.complaints == []


def test_arrow_keys_turn_a_surface_and_a_double_click_turns_it_back(browser, tmp_path):
    page = browser.open(samples.pair(points=9).save(tmp_path / "pair.html"))
    page.show_surfaces()
    canvas = "document.querySelector('.canvas canvas')"
    page.wait(f"Boolean({canvas}.dataset.camera)")
    before = page.run(f"{canvas}.dataset.camera")
    page.run(f"void {canvas}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft'}}))")
    page.wait(f"{canvas}.dataset.camera !== '{before}'")
    page.run(f"void {canvas}.dispatchEvent(new MouseEvent('dblclick'))")
    page.wait(f"{canvas}.dataset.camera === '{before}'")


def test_near_cells_hide_far_ones(browser, tmp_path):
    """A ridge before a plateau: from the ridge's side the plateau, red, is hidden; from behind it is seen."""
    values = np.full((21, 21), 0.1)
    values[:, 8:11], values[:, 14:] = 1000.0, 0.1 * 10 ** (4 * 0.35)
    surface = dataclasses.replace(samples.surface(21), values=values)
    page = browser.open(surface.save(tmp_path / "s.html"))
    page.show_surfaces()
    red_pixels = """(azimuth => {
        const canvas = document.createElement('canvas');
        canvas.style.cssText = 'width:300px;height:300px;position:fixed;top:0;left:0';
        document.body.append(canvas);
        const data = JSON.parse(document.querySelector('.scenes script').textContent);
        const ramp = Array.from({length: 65}, (_, i) => Math.abs(i - 22.4) < 2 ? [255, 0, 0] : [0, 0, 255]);
        const look = {...data, ramp, ticks: [], texts: []};
        Surface3D.draw(canvas, data.surfaces[0], look, {azimuth, elevation: 0.25}, {soft: '#888', hair: 'transparent'});
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let red = 0;
        for (let i = 0; i < pixels.length; i += 4) red += pixels[i] > 120 && pixels[i + 2] < 60 && pixels[i + 3] > 200;
        canvas.remove();
        return red;
    })"""
    front, behind = page.run(f"{red_pixels}(0)"), page.run(f"{red_pixels}(Math.PI)")
    assert behind > 1000
    assert front < behind / 10


def test_a_surface_without_any_height_does_not_stop_its_neighbour(browser, tmp_path):
    pair = samples.pair(points=9)
    names = list(pair.surfaces)
    broken = dataclasses.replace(pair.surfaces[names[1]], values=np.full((9, 9), np.nan))
    pair = dataclasses.replace(pair, surfaces={**pair.surfaces, names[1]: broken})
    page = browser.open(pair.save(tmp_path / "pair.html"))
    page.show_surfaces()
    assert page.run("document.querySelectorAll('.canvas')[0].querySelectorAll('canvas').length") > 0
    assert page.complaints == []


def test_the_slider_makes_another_strength_strong(browser, tmp_path):
    sweep = samples.strength()
    page = browser.open(sweep.save(tmp_path / "s.html"))
    strong = "[...document.querySelectorAll('.wide g.frame.on')].map(g => g.dataset.frame).join()"
    assert page.run(strong) == str(len(sweep.strengths) - 1)
    page.run(
        "(i => { i.value = 0; i.dispatchEvent(new Event('input')); })(document.querySelector('.slider input'))"
    )
    assert page.run(strong) == "0"
    assert sweep.states[0] in page.run("document.querySelector('.slider output').textContent")


def test_a_pointer_is_told_the_numbers(browser, tmp_path):
    flow = samples.flow(12)
    page = browser.open(flow.save(tmp_path / "f.html"))
    assert page.run("document.querySelector('.tip').hidden") is True
    page.run(
        "document.querySelector('.wide .hits circle').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    assert page.run("document.querySelector('.tip').hidden") is False
    assert flow.boundaries[0].name in page.run("document.querySelector('.tip').textContent")


def test_a_word_is_explained_on_hover_focus_and_tap(browser, report):
    page = browser.open(report)
    term = "document.querySelector('abbr.term')"
    tip = "document.querySelector('.tip')"
    for event in ("new PointerEvent('pointerover', {bubbles: true, pointerType: 'touch'})", None):
        page.run(f"void ({term}.{f'dispatchEvent({event})' if event else 'focus()'})")
        page.wait(f"{tip}.hidden === false && {tip}.textContent === {term}.dataset.tip")
        page.run("void document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
        page.wait(f"{tip}.hidden === true")


def test_a_charts_points_are_reached_by_keyboard(browser, tmp_path):
    page = browser.open(samples.flow(12).save(tmp_path / "f.html"))
    chart = "document.querySelector('.wide svg.chart, svg.chart.wide, svg.chart')"
    page.run(f"void {chart}.focus()")
    page.run(
        f"void {chart}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight', bubbles: true}}))"
    )
    page.wait("document.querySelector('.tip').hidden === false")
    first = page.run("document.querySelector('.tip').textContent")
    page.run(
        f"void {chart}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight', bubbles: true}}))"
    )
    page.wait(f"document.querySelector('.tip').textContent !== {first!r}")


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, report, width):
    page = browser.open(report, width, 740, phone=width < 700)
    page.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.run("document.documentElement.scrollWidth") <= width
    visible = "window.getComputedStyle(document.querySelector('.{}')).display !== 'none'"
    assert page.run(visible.format("narrow")) is (width <= 600)
    assert page.run(visible.format("wide")) is (width > 600)
    # Letters of charts keep a size that can be read
    smallest = "Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height).filter(h => h > 0))"
    assert page.run(smallest) >= (8 if width < 340 else 9)


@pytest.mark.parametrize("width", [380, 1000])
def test_words_above_a_map_of_gradients_do_not_touch(browser, tmp_path, width):
    page = browser.open(samples.restless().save(tmp_path / "h.html"), width, 800, phone=width < 700)
    boxes = page.run(
        "[...document.querySelectorAll('.skipscope figure')].slice(0, 2).map(f => [...f.querySelectorAll('svg .note, svg .title, svg image')]"
        ".map(t => t.getBoundingClientRect()).filter(r => r.width > 0).map(r => [r.left, r.top + 1, r.right, r.bottom - 1]))"
    )
    assert page.run("document.documentElement.scrollWidth") <= width
    for chart in boxes:
        assert len(chart) >= 6  # the title, the axis, the map, its key and at least two events
        for i, (left, top, right, bottom) in enumerate(chart):
            for other in chart[:i]:
                assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom


def test_in_print_the_charts_are_there_and_the_buttons_are_not(browser, report):
    page = browser.open(report, 760, 1000, media="print")
    shown = "e => e.getClientRects().length > 0 && e.getBoundingClientRect().height > 40"
    charts = "[...document.querySelectorAll('.wide svg')].filter(e => !e.closest('details'))"
    assert page.run(f"{charts}.length") >= 7
    assert page.run(f"{charts}.every({shown})")
    for gone in ("nav", ".slider", ".scenes", "details", ".narrow"):
        assert page.run(
            f"[...document.querySelectorAll('{gone}')].every(e => e.getClientRects().length === 0)"
        ), gone
    assert len(page.pdf()) > 50_000


def test_without_scripts_the_contours_remain(browser, report):
    page = browser.open(report)
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.send("Page.reload")
    page.wait("document.readyState === 'complete'")
    assert page.run("document.documentElement.className") == ""
    assert page.run("getComputedStyle(document.querySelector('.scenes')).display") == "none"
    assert page.run("document.querySelectorAll('.contour').length") >= 6


def test_dark_mode_turns_the_paper_dark(browser, report):
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = (browser.open(report, dark=dark).run(colour) for dark in (False, True))
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 600
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 120


# --- hostile text ---

RAN = "Boolean(window.pwned || document.documentElement.dataset.pwned)"


def hostile(text: str) -> str:
    """A text of a result with every payload in it."""
    return text + " ".join(PAYLOADS)


@pytest.fixture(autouse=True)
def room_for_hostile_text(monkeypatch):
    """Every text of these results is 4,000 characters long: more than a page would be given."""
    monkeypatch.setattr(_page, "MOST", 10**9)


def without_policy(page: str) -> str:
    """The same page with its second line of defence taken away."""
    made, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    return made


def test_payloads_do_run_where_nothing_is_escaped(browser, tmp_path):
    assert len(PAYLOADS) >= 50
    bad = tmp_path / "bad.html"
    bad.write_text("<title>x</title><body>" + PAYLOADS[0] + "</body>")
    page = browser.open(bad)
    page.wait(RAN)


@pytest.mark.parametrize(
    "policy",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["with its policy", "without its policy"],
)
def test_no_hostile_text_runs_in_the_page(browser, tmp_path, policy):
    path = samples.comparison(hostile, depth=6, points=5).save(tmp_path / "x.html")
    if not policy:
        path.write_text(without_policy(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert_nothing_runs(browser, path)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(samples.everything())))
def test_no_hostile_text_runs_in_any_result(browser, tmp_path, index):
    path = samples.everything(hostile)[index].save(tmp_path / "x.html")
    path.write_text(without_policy(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert_nothing_runs(browser, path)


def test_no_hostile_text_runs_in_fragments_and_drawings(browser, tmp_path):
    path = tmp_path / "x.html"
    found = samples.found(text=hostile)
    parts = [r._repr_html_() for r in samples.everything(hostile)] + [draw(found, "html"), draw(found, "svg")]
    path.write_text("<!doctype html><meta charset=utf-8><title>x</title>" + "".join(parts), encoding="utf-8")
    assert_nothing_runs(browser, path)
    alone = tmp_path / "x.svg"
    alone.write_text(draw(found, "svg"), encoding="utf-8")
    assert_nothing_runs(browser, alone)


def assert_nothing_runs(browser, path):
    page = browser.open(path)
    page.run(
        "document.querySelectorAll && document.querySelectorAll('details').forEach(d => { d.open = true; })"
    )
    page.run(  # a pointer over everything, and every tip shown
        "[...document.querySelectorAll('[data-tip]')].slice(0, 400).forEach(e => e.dispatchEvent(new PointerEvent('pointerover', {bubbles: true})))"
    )
    page.wait("new Promise(done => setTimeout(() => done(true), 400))")
    assert page.run(RAN) is False
    assert page.requests == []
    assert page.complaints == []
