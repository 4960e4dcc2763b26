"""A file of user code with annotations, checked by pyright in strict mode (and a mistaken one, which it must find)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = (Path(__file__).parent / "typed" / "user_code.py").read_text()
SOURCE = Path(__file__).parents[2] / "src"
MISTAKES = {
    'how="detach"': 'how="detached"',
    "surface: ss.Surface": "surface: ss.SurfaceBand",
    "penalty(model, batch[0])": "penalty(batch[0])",
}


def errors(folder, code):
    (folder / "user_code.py").write_text(code)
    (folder / "pyrightconfig.json").write_text(
        json.dumps(
            {"typeCheckingMode": "strict", "extraPaths": [str(SOURCE)], "reportMissingTypeStubs": False}
        )
    )
    words = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        sys.executable,
        "--outputjson",
        "-p",
        str(folder),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    return json.loads(done.stdout)["generalDiagnostics"]


@pytest.mark.slow
def test_annotated_user_code_is_right_and_mistakes_are_found(tmp_path):
    assert errors(tmp_path, CODE) == []
    for right, wrong in MISTAKES.items():
        assert right in CODE
        assert errors(tmp_path, CODE.replace(right, wrong)), wrong
