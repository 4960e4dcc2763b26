"""Training scripts as other people write them, with two or three lines of skipscope. Each holds its own assertions."""

import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_of_a_stranger_runs_and_gets_the_right_answer(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        runpy.run_path(str(script))
    random.setstate(python)
    np.random.set_state(arrays)


def test_they_are_twenty_and_use_few_lines():
    assert len(SCRIPTS) >= 20
    for script in SCRIPTS:
        lines = [
            line
            for line in script.read_text().splitlines()
            if re.search(r"\bss\.", line) and "assert" not in line
        ]
        assert 1 <= len(lines) <= 4, script.stem
