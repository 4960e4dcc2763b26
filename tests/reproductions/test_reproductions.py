"""Each reproduction runs in its quick form, goes on after a fault, and its pages say what its results say."""

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reproductions.__main__ import main, names

from reproductions import _pages, _report

ROOT = Path(__file__).parents[2]
FIELDS = {"reproduction", "size", "claims", "table", "figures", "provenance", "rows"}
CLAIM = {"name", "statement", "where", "criterion", "verdict", "ours", "why"}


# Their quick forms take longest, and share the code that they run with others.
SLOW = {"he", "li_curvature", "li_sharpness"}


class Killed(BaseException):
    """Ends a run where it is, as a kill would."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names()]
)
def test_the_quick_form_goes_on_after_a_fault_and_is_complete(name, tmp_path, monkeypatch):
    module = importlib.import_module(f"reproductions.{name}")
    measure, done = module.measure, []

    def fails_at_the_second(setting):
        if len(done) == 1:
            raise Killed
        done.append(setting)
        return measure(setting)

    monkeypatch.setattr(module, "measure", fails_at_the_second)
    with pytest.raises(Killed):
        main([name, "--quick", "--out", str(tmp_path)])
    assert len(list((tmp_path / "units" / name).glob("*.json"))) == 1
    assert not (tmp_path / f"{name}.json").exists()

    def counts(setting):
        done.append(setting)
        return measure(setting)

    monkeypatch.setattr(module, "measure", counts)
    main([name, "--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(done) == len(result["rows"]) == result["provenance"]["units"]  # each unit once
    assert done == [{key: row[key] for key in setting} for setting, row in zip(done, result["rows"])]
    assert set(result) == FIELDS
    assert all(set(claim) == CLAIM and claim["verdict"] in _report.VERDICTS for claim in result["claims"])
    assert result["table"] and result["figures"]
    for picture in result["figures"]:
        assert (tmp_path / picture).read_text().startswith("<?xml")


@pytest.mark.parametrize("path", sorted(_report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_kept_verdicts_follow_from_the_kept_rows(path):
    result = json.loads(path.read_text())
    module = importlib.import_module(f"reproductions.{path.stem}")
    judgements = module.judge(result["rows"])
    for claim, kept in zip(module.REPRODUCTION.claims, result["claims"], strict=True):
        assert (claim.name, claim.criterion) == (kept["name"], kept["criterion"])
        assert judgements[claim.name].verdict == kept["verdict"]
        assert judgements[claim.name].ours == kept["ours"]
    assert all((_report.RESULTS / picture).exists() for picture in result["figures"])


def test_the_committed_pages_are_those_of_the_results():
    committed = {path.name: path.read_text() for path in _pages.PAGES.glob("*.md")}
    assert committed == _pages.render(), "run: python -m reproductions pages"


def test_figures_have_the_same_bytes_every_time(tmp_path):
    module = importlib.import_module("reproductions.balduzzi")
    rows = json.loads((_report.RESULTS / "balduzzi.json").read_text())["rows"]
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        drawn.append([(folder / n).read_bytes() for n in _report.draw("balduzzi", module, rows, folder)])
    assert drawn[0] == drawn[1]


def test_intervals_are_those_of_student():
    found = _report.estimate([1.0, 2.0, 3.0, 4.0])
    # t(0.975, 3) = 3.182; the standard error is sqrt(5/3)/2.
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert found.mean == 2.5 and found.high == pytest.approx(2.5 + half, rel=1e-5)
    assert _report.paired([3, 4, 5], [1, 2, 3]) == _report.Estimate(2.0, 2.0, 2.0, 3)
    assert _report.geometric([1.0, 100.0]).mean == pytest.approx(10)
    assert math.isnan(_report.estimate([1.0]).low)


def test_the_list_is_printed_by_a_process_of_its_own():
    words = [sys.executable, "-m", "reproductions"]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in printed.splitlines()] == names()


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    words = [sys.executable, "-m", "reproductions", "balduzzi", "--quick", "--out", str(tmp_path)]
    units = tmp_path / "units" / "balduzzi"
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(units.glob("*.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in units.glob("*.json")}
    assert kept and not (tmp_path / "balduzzi.json").exists()
    main(words[3:])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (tmp_path / "balduzzi.json").exists()
