"""The live page in a real browser: what it computes is what skipscope computes, and its Python prints the same."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from report import live_oracle as oracle
from report.browser import CHROMIUM, Browser, Page
from skipscope import book
from skipscope._errors import SkipscopeError
from skipscope.cli import Output, play
from skipscope.report import live_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
MOST_BYTES = 400_000
CLOSE, LOSSES_CLOSE, STABLE = 1e-9, 1e-6, 1e-7
SMALL = [
    {"depth": 6, "width": 16, "activation": "gelu", "init": "default", "norm": "none", "shortcut": "identity", "span": 1, "data": "digits", "batch": 8, "optimizer": "momentum", "rate": -1},
    {"depth": 9, "width": 5, "activation": "tanh", "init": "orthogonal", "norm": "layer", "shortcut": "scaled", "strength": 0.5, "span": 2, "data": "spirals", "batch": 4, "optimizer": "adam", "rate": -2},
    {"depth": 5, "width": 3, "activation": "relu", "init": "he", "gain": 1.2, "norm": "none", "shortcut": "none", "span": 3, "data": "lecture", "batch": 1, "optimizer": "sgd", "rate": -1},
    {"depth": 7, "width": 64, "activation": "sigmoid", "init": "xavier", "norm": "layer", "shortcut": "identity", "span": 4, "data": "digits", "batch": 3, "optimizer": "adam", "rate": -3},
]  # fmt: skip

# Asks the page's own workers, as the page does, and waits for all answers.
ASK = """(async (wanted, optimizers) => {
  const settings = valid(wanted), twin = settings.shortcut === "none" ? "without" : "with";
  const worker = globalThis.tested ??= new WorkerClient(document.querySelector("#mathematics").textContent, await unpack(document.querySelector("#digits")));
  const ask = (kind, request) => new Promise((done) => { worker.hear = (data) => done(data.answer); worker.ask(kind, request); });
  const flow = await ask("flow", { settings }), spectrum = await ask("spectrum", { settings, twin }), losses = {};
  for (const [optimizer, rate] of optimizers) {
    await ask("reset", { settings: { ...settings, optimizer, rate } });
    losses[optimizer] = [];
    for (let i = 0; i < 20; i++) losses[optimizer].push((await ask("step")).twins[twin].loss);
  }
  const found = { settings, flow: flow.twins[twin], spectrum, losses, python: asPython(settings), milliseconds: flow.milliseconds };
  return JSON.stringify(found, (_, v) => (typeof v === "number" && !Number.isFinite(v) ? String(v) : v));
})(%s, %s)"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("live") / "play.html"
    path.write_text(live_page(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(browser, file):
    opened = browser.open(file)
    opened.wait("document.documentElement.dataset.spectrum !== undefined")
    return opened


def ask(page: Page, settings: dict[str, Any], optimizers: list[tuple[str, float]]) -> dict[str, Any]:
    return json.loads(page.run(ASK % (json.dumps(settings), json.dumps(optimizers))))


def far(browser: Any, oracle: np.ndarray) -> float:
    """The greatest relative difference; of a spectrum or a list of gradients no element may be off by itself."""
    mine, right = np.atleast_1d(np.array(browser, float)), np.atleast_1d(oracle)
    assert mine.shape == right.shape, (mine.shape, right.shape)
    same = (mine == right) | (np.isnan(mine) & np.isnan(right))
    with np.errstate(all="ignore"):
        off = np.where(same, 0, np.abs(mine - right) / np.maximum(np.abs(right), 1e-300))
    return float(np.nanmax(off, initial=0)) if not np.isnan(off).any() else np.inf


def differences(found: dict[str, Any]) -> dict[str, float]:
    """Between what the browser says and what skipscope says, for each quantity."""
    right, flow, spectrum = oracle.readings(found["settings"]), found["flow"], found["spectrum"]
    factor = [np.nan if f is None else float(f) for f in flow["factor"]]
    norms = np.array(spectrum["norms"], float)
    norms = np.pad(norms, (0, max(0, len(right["norms"]) - len(norms))))
    expected = np.pad(right["norms"], (0, max(0, len(norms) - len(right["norms"]))))
    around = [a for a in flow["arrivals"] if a["shortcut"] != 0]
    off = {name: far(flow[name], right[name]) for name in ("gradient", "weights", "loss", "share")}
    off |= {"factor": far(factor, right["factor"]), "norms": far(norms, expected), "mean": far(spectrum["meanLength"], right["mean"])}  # fmt: skip
    if len(around) == len(right["around"]):
        unit = float(flow["unit"])
        off["around"] = far(np.array([a["shortcut"] for a in around], float) * unit, right["around"])
        off["branch"] = far(np.array([a["branch"] for a in around], float) * unit, right["branch"])
    return off


def run_python(code: str) -> dict[str, Any]:
    """The Python of the page, run as it is copied."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "as_python", "exec"), names)
    return names


def test_the_page_is_one_small_offline_file_that_opens_without_complaint(page, file):
    assert file.stat().st_size < MOST_BYTES
    assert "one part in 10" in page.run("document.querySelector('#headline').textContent")
    assert page.requests == [] and page.complaints == []


@pytest.mark.parametrize("wanted", SMALL, ids=lambda s: f"{s['data']}-{s['init']}-{s['shortcut']}")
def test_the_browser_computes_what_skipscope_computes(page, wanted):
    found = ask(page, {"seed": 7, **wanted}, [(wanted["optimizer"], wanted["rate"])])
    assert max((off := differences(found)).values()) < CLOSE, off
    s = found["settings"]
    trained = oracle.losses(s, s["optimizer"], 10 ** s["rate"])
    assert far(found["losses"][s["optimizer"]], trained) < LOSSES_CLOSE
    names = run_python(found["python"])
    assert (
        far(found["flow"]["gradient"], np.array([b.gradient_rms for b in names["flow"].boundaries])) < CLOSE
    )
    assert far(names["losses"], trained) < CLOSE


def test_the_comparison_can_fail(page):
    found = ask(page, {**SMALL[0], "seed": 7}, [])
    found["settings"]["seed"] = 8
    assert min(differences(found)[name] for name in ("gradient", "factor", "weights", "norms")) > 1e-3


def test_the_last_start_prints_the_ten_numbers_of_the_lecture(browser, file):
    lecture = book.experiment(seeds=1)
    page = browser.open(file)
    page.wait("document.documentElement.dataset.spectrum !== undefined")
    page.run("document.querySelectorAll('#starts a')[5].click()")
    page.wait("document.querySelector('#lecture-with').textContent.length > 100")
    for twin, pick in (("without", "without"), ("with", "with_shortcuts")):
        printed = page.run(f"document.querySelector('#lecture-{twin}').textContent")
        values = np.array([float(v) for v in re.findall(r"gradient mean of (\S+)", printed)])
        np.testing.assert_allclose(
            values, [getattr(mean, pick) for mean in lecture.gradient_means], rtol=1e-6
        )


def test_the_command_writes_the_page(tmp_path, capsys):
    play(output=Output(out=tmp_path, open=False))
    assert str(tmp_path / "play.html") in capsys.readouterr().out
    assert (tmp_path / "play.html").read_text(encoding="utf-8") == live_page()
    # Pages beside it link to it; others name the command.
    result = book.experiment(seeds=1)
    assert 'href="play.html"' in result.save(tmp_path / "book.html").read_text(encoding="utf-8")
    (tmp_path / "alone").mkdir()
    alone = result.save(tmp_path / "alone" / "book.html").read_text(encoding="utf-8")
    assert "play.html" not in alone and "skipscope play" in alone


def test_a_folder_whose_name_no_system_takes_is_refused_and_forgotten(tmp_path):
    with pytest.raises(SkipscopeError, match="cannot use the folder"):
        play(output=Output(out=tmp_path / "a\0b", open=False))
    play(output=Output(out=tmp_path, open=False))
    assert (tmp_path / "play.html").exists()


def press(page: Page, key: str) -> None:
    code = {"ArrowRight": 39, "ArrowLeft": 37}[key]
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def test_keyboard_and_address_move_it_and_layers_are_told_in_words(browser, file):
    page = browser.open(file)
    page.wait("document.documentElement.dataset.spectrum !== undefined")
    page.run("location.hash = '#shortcut=identity&strength=0.5&depth=8'")
    page.wait("state.shown.settings.depth === 8 && state.shown.settings.strength === 0.5")
    page.run("document.querySelector('[name=strength]').focus()")
    press(page, "ArrowRight")
    page.wait("state.shown.settings.strength === 0.55")
    page.wait("location.hash.includes('strength=0.55')")
    assert page.run("document.querySelector('[name=strength]').getAttribute('aria-valuetext')") == "0.55"
    page.run("document.querySelector('#figure').focus()")
    press(page, "ArrowRight")
    press(page, "ArrowRight")
    said = page.run("document.querySelector('#figure').getAttribute('aria-valuetext')")
    assert said.startswith("Layer 2: gradient") and "slope of GELU" in said
    assert page.run("document.querySelector('#layer-words').textContent") == said
    page.wait("document.querySelector('#spoken').textContent.includes('strength 0.55')")
    page.run(
        "location.hash = '#depth=nonsense&width=1e9&seed=-4&activation=evil'"
    )  # put right, never believed
    page.wait("state.shown.settings.width === 64 && state.shown.settings.depth === 30")
    assert page.complaints == []


EXTREMES = [
    {
        "depth": 60,
        "gain": 3,
        "shortcut": "identity",
        "strength": 1.5,
        "activation": "linear",
        "init": "he",
        "width": 64,
    },
    {"depth": 60, "gain": 0.1, "activation": "sigmoid", "width": 3},
    {"depth": 2, "width": 3, "data": "lecture", "activation": "relu", "span": 4, "seed": 3},
    {"depth": 60, "width": 4, "activation": "relu", "init": "he", "batch": 1, "seed": 2},
    {
        "depth": 40,
        "gain": 3,
        "shortcut": "scaled",
        "strength": 0,
        "norm": "layer",
        "data": "spirals",
        "activation": "tanh",
    },
    {"depth": 30, "gain": 3, "shortcut": "identity", "init": "orthogonal", "activation": "relu", "batch": 1},
]


def test_no_setting_makes_it_say_or_draw_what_is_not_a_number(browser, file):
    page = browser.open(file)
    page.wait("document.documentElement.dataset.spectrum !== undefined")
    page.run("document.querySelector('#numbers').open = true")
    for wanted in EXTREMES:
        page.run("state.shown = null, state.spectrum = null, state.selected = 1")
        page.run(f"apply(valid({json.dumps(wanted)}))")
        page.wait("state.shown !== null && state.spectrum !== null")
        for reading in ("gradient", "factor", "weights"):
            drawn = page.run(
                f"state.reading = '{reading}', select(1), draw(), document.querySelector('main').outerHTML + document.querySelector('header').innerHTML"
            )
            assert not re.search("NaN|undefined|Infinity", drawn), (
                wanted,
                re.search(".{80}(NaN|undefined|Infinity).{40}", drawn),
            )
    assert page.complaints == []


@pytest.mark.parametrize(("width", "dark"), [(320, False), (375, True), (1280, True)])
def test_it_fits_every_width(browser, file, width, dark):
    page = browser.open(file, width=width, height=700, phone=width < 600, dark=dark)
    page.wait("document.documentElement.dataset.spectrum !== undefined")
    page.run("document.querySelector('#more').click(), document.querySelector('#python').open = true")
    assert page.run("document.documentElement.scrollWidth") <= width
    if width < 600:  # the sheet of controls leaves the network in sight
        top = page.run("document.querySelector('#controls').getBoundingClientRect().top")
        assert page.run("document.querySelector('#network').getBoundingClientRect().top") < top - 60
    assert page.complaints == []


def test_twins_train_side_by_side_and_the_loss_around_them_is_measured(browser, file):
    wanted = {"shortcut": "scaled", "depth": 4, "width": 8, "batch": 8, "seed": 5, "rate": -1}
    page = browser.open(file)
    page.wait("document.documentElement.dataset.spectrum !== undefined")
    page.run(f"apply(valid({json.dumps(wanted)}))")
    page.wait("state.shown.settings.depth === 4")
    for steps in (1, 2, 3):
        page.run("document.querySelector('#one').click()")
        page.wait(f"state.history.steps === {steps} && state.waiting === null")
    assert "After 3 steps the network with scaled shortcuts" in page.run(
        "document.querySelector('#training-words').textContent"
    )
    page.run("document.querySelector('#look').click()")
    page.wait("document.querySelector('#around').dataset.done === 'yes'")
    found = json.loads(page.run("JSON.stringify([state.around.slices, state.grids.with.z, state.history])"))
    for twin, shortcut in (("with", "scaled"), ("without", "none")):
        s = {**json.loads(page.run("JSON.stringify(state.settings)")), "shortcut": shortcut}
        assert far(found[2][twin]["loss"], oracle.losses(s, "sgd", 0.1, steps=3)) < LOSSES_CLOSE
        slice_, corner = oracle.around(s, steps=3, points=61)
        assert far(found[0][twin], slice_) < CLOSE
        if twin == "with":
            assert far(10 ** np.array(found[1][0][0]), np.array(corner)) < CLOSE
    page.run("document.querySelector('#again').click()")
    page.wait("document.querySelector('#training').className === 'empty'")
    page.run("document.querySelector('#train').click()")
    page.wait("state.history.steps > 3")
    page.run("document.querySelector('#train').click()")
    assert page.run("state.training") == "paused"
    assert page.complaints == []


@pytest.mark.slow
def test_two_hundred_random_settings(page):
    optimizers, stable = [("sgd", -2), ("momentum", -2), ("adam", -3)], {}
    worst: dict[str, float] = {}
    for number, wanted in enumerate(oracle.random_settings(200)):
        found = ask(page, wanted, optimizers)
        off = differences(found)
        assert max(off.values()) < CLOSE, (off, found["settings"])
        for name, rate in optimizers:
            right = oracle.losses(found["settings"], name, 10**rate)
            moved = oracle.losses(found["settings"], name, 10**rate, off=1e-15)
            if far(moved, right) < STABLE:
                stable[name] = stable.get(name, 0) + 1
                assert far(found["losses"][name], right) < LOSSES_CLOSE, (name, found["settings"])
        if number % 10 == 0:
            names = run_python(found["python"])
            assert (
                far(found["flow"]["gradient"], np.array([b.gradient_rms for b in names["flow"].boundaries]))
                < CLOSE
            )
        worst = {name: max(value, worst.get(name, 0)) for name, value in off.items()}
    print(f"worst relative differences: {worst}; settings with stable training: {stable}")
    assert min(stable.values()) >= 150, stable


def test_python_runs_as_it_is_copied_in_a_process_of_its_own(page):
    found = ask(page, {**SMALL[1], "seed": 11}, [("adam", -2)])
    done = subprocess.run(
        [sys.executable, "-c", found["python"]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    losses = [float(v) for v in done.stdout.strip().splitlines()[-1].split()]
    assert far(found["losses"]["adam"], np.array(losses)) < LOSSES_CLOSE


def test_a_change_is_answered_at_once(browser, file):
    page = browser.open(file)
    page.wait("document.documentElement.dataset.spectrum !== undefined")
    times = []
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        page.run(f"change('shortcut', 'identity'), change('strength', {strength})")
        time.sleep(0.3)
        times.append(float(page.run("document.documentElement.dataset.flow")))
    assert np.median(times) < 500, times  # a busy machine; the figures of a quiet one are in the notes
