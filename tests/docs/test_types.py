"""A file of user code with annotations, checked by pyright and mypy, both strict; planted mistakes must be found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn.functional import cross_entropy

import skipscope as ss
from skipscope import nn as connections
from skipscope._option_words import (
    ConnectionKind,
    GradientState,
    LiveBasis,
    LiveState,
    MissingCause,
    ModelMode,
    VerdictCause,
    VerdictState,
)
from skipscope.flow import BoundaryFlow, LayerGradient
from skipscope.flow.verdict._chain_verdict import ORDER
from skipscope.flow.verdict._verdict_words import ADVICE
from skipscope.monitor import STATES, LiveVerdict
from skipscope.monitor.recording._missing_gradients import MissingGradients

CODE = (Path(__file__).parent / "typed" / "user_code.py").read_text()
SOURCE = Path(__file__).parents[2] / "src"
# In each copy of the file one line is wrong; every checker must see every one of them.
MISTAKES = {
    "how": ('how="detach"', 'how="detached"'),
    "result": ("surface: ss.Surface", "surface: ss.SurfaceBand"),
    "signature": ("penalty(model, batch[0])", "penalty(batch[0])"),
    "kind": ('select(kind="identity")', 'select(kind="identical")'),
    "connection": ('kind="rezero"', 'kind="re-zero"'),
    "normalization": ('normalize="filter"', 'normalize="filters"'),
    "zero": ('zero=("biases",)', 'zero=("bias",)'),
    "batch_norm": ('batch_norm="recalibrate"', 'batch_norm="recalibrated"'),
    "precision": ('precision="bf16"', 'precision="bfloat16"'),
    "engine": ('engine="local"', 'engine="locally"'),
    "matrix": ('matrix="gauss_newton"', 'matrix="gauss-newton"'),
    "method": ('method="hutchinson"', 'method="hutch"'),
    "of": ('of="loss"', 'of="losses"'),
    "quantity": ('matrix("flow")', 'matrix("flows")'),
    "form": ('draw("svg")', 'draw("png")'),
    "style": ('style("paper")', 'style("papers")'),
    "state": ('state == "vanishing"', 'state == "vanished"'),
    "cause": ('cause == "saturation"', 'cause == "saturated"'),
    "live state": ('before == "unknown"', 'before == "not known"'),
    "band": ("pair_band: ss.PairedBand", "pair_band: ss.PairedSurfaces"),
    "maps": ("maps: ss.PairedMaps", "maps: ss.CurvatureMap"),
}


def write(folder):
    (folder / "right.py").write_text(CODE)
    for name, (right, wrong) in MISTAKES.items():
        assert CODE.count(right) == 1, right
        (folder / f"wrong_{name}.py").write_text(CODE.replace(right, wrong))


def pyright(folder):
    """File name -> lines with an error."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(SOURCE)], "reportMissingTypeStubs": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", folder],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] == len(MISTAKES) + 1
    return {(Path(one["file"]).name, one["range"]["start"]["line"]) for one in found}


def mypy(folder):
    """File name -> lines with an error."""
    # As for an installed package, what it says of the package itself is not the user's affair.
    (folder / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-skipscope.*]\nignore_errors = True\nfollow_imports = silent\n"
    )
    files = sorted(path.name for path in folder.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", sys.executable, "--output", "json", *files],
        cwd=folder, capture_output=True, text=True, timeout=280, env=os.environ | {"MYPYPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.returncode in {0, 1} and not done.stderr, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(one["file"], one["line"] - 1) for one in found if one["severity"] == "error"}


@pytest.mark.parametrize("checker", [pyright, mypy], ids=["pyright", "mypy"])
def test_annotated_user_code_is_right_and_every_planted_mistake_is_found(checker, tmp_path):
    if checker is mypy:
        pytest.importorskip("mypy")
    elif tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip("older torch leaves types out that strict pyright asks for")
    write(tmp_path)
    found = checker(tmp_path)
    assert not {place for place in found if place[0] == "right.py"}
    lines = CODE.splitlines()
    expected = {
        (f"wrong_{name}.py", number)
        for name, (right, _) in MISTAKES.items()
        for number, line in enumerate(lines)
        if right in line
    }
    assert len(expected) == len(MISTAKES)
    assert expected <= found, expected - found


def test_the_words_for_connections_are_the_registry():
    assert get_args(ConnectionKind) == tuple(connections.registry())


@pytest.mark.parametrize(
    ("words", "result"),
    [
        (GradientState, BoundaryFlow), (GradientState, LayerGradient), (ModelMode, ss.GradientFlow),
        (VerdictState, ss.Verdict), (VerdictCause, ss.Verdict),
        (LiveState, LiveVerdict), (LiveBasis, LiveVerdict), (MissingCause, MissingGradients),
    ],
)  # fmt: skip
def test_the_docstring_of_a_result_names_each_word_that_it_gives(words, result):
    named = set(re.findall(r'``"([^"]+)"``', result.__doc__))
    assert set(get_args(words)) - named == set()


def test_states_are_ordered_and_causes_have_advice():
    assert set(ORDER) == set(get_args(VerdictState))
    assert STATES[: len(get_args(GradientState))] == get_args(GradientState)
    # Without advice of its own, a cause has that of ss.prescribe.
    assert set(get_args(VerdictCause)) - set(ADVICE) == {"none", "gain", "unexplained"}


def test_a_verdict_is_loaded_with_its_words_and_refused_with_others(tmp_path):
    model, data = ss.reference.deep_mlp(4, width=16), ss.reference.digits(32)
    text = Path(ss.gradient_flow(model, data, cross_entropy).save(tmp_path / "flow.json")).read_text()
    assert ss.load(tmp_path / "flow.json").verdict.state == "healthy"
    content = json.loads(text)
    del content["sha256"]
    content["data"]["verdict"]["state"] = "fine"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ss.SkipscopeError, match="not a saved result"):
        ss.load(tmp_path / "other.json")
