"""How soon the live page (``skipscope play``) answers, in a real Chromium: needs one, and the tests' own driver."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from skipscope.report import live_page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from report.browser import Browser, Page

# Depth, width, samples of the brief's figure, and of the first screen.
USUAL = {"depth": 30, "width": 32, "batch": 16, "shortcut": "identity", "data": "digits"}
LARGEST = {"depth": 60, "width": 64, "batch": 64, "shortcut": "identity", "data": "digits"}
CHANGES = 15


def figures() -> list[dict]:
    """From a change of a setting to the answer on the page, in milliseconds of the page's own clock."""
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        file = Path(folder) / "play.html"
        file.write_text(live_page(), encoding="utf-8")
        page = browser.open(file)
        page.wait("document.documentElement.dataset.spectrum !== undefined")
        flow, _ = _answers(page, USUAL)
        _, spectrum = _answers(page, LARGEST)
        trained = _steps_a_second(page)
    size = "30 layers of width 32, 16 samples"
    return [
        {"name": f"the flow after a change, {size}", "value": flow, "unit": "ms", "aim": 50},
        {"name": "the spectrum after a change, at the maximum", "value": spectrum / 1e3, "unit": "s", "aim": 1},
        {"name": f"both twins trained, {size}", "value": trained, "unit": "steps a second", "aim": 30},
    ]  # fmt: skip


def _answers(page: Page, settings: dict) -> tuple[float, float]:
    """Medians over changes of the strength, each waited for."""
    page.run(f"apply(valid({json.dumps(settings)}))")
    flow, spectrum = [], []
    for i in range(CHANGES):
        page.run("delete document.documentElement.dataset.spectrum")
        page.run(f"change('strength', {0.05 * (i + 1):.2f})")
        page.wait("document.documentElement.dataset.spectrum !== undefined && !state.asked")
        flow.append(float(page.run("document.documentElement.dataset.flow")))
        spectrum.append(float(page.run("document.documentElement.dataset.spectrum")))
    return statistics.median(flow), statistics.median(spectrum)


def _steps_a_second(page: Page, seconds: float = 6) -> float:
    page.run(f"apply(valid({json.dumps(USUAL)}))")
    page.run("document.querySelector('#train').click()")
    page.wait("state.history?.steps > 10")
    before, start = page.run("state.history.steps"), time.perf_counter()
    time.sleep(seconds)
    after, end = page.run("state.history.steps"), time.perf_counter()
    return (after - before) / (end - start)
