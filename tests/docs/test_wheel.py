"""The wheel and the source distribution, built, installed into an empty environment and tried."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_built_packages_work(tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "builder")
    builder = tmp_path / "builder" / "bin" / "python"
    run(builder, "-m", "pip", "install", "--quiet", "build")
    run(builder, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,), (source,) = tmp_path.glob("dist/*.whl"), tmp_path.glob("dist/*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for needed in (
        "py.typed",
        "__init__.pyi",
        "reference/digits.npz",
        "report/chart.css",
        "report/page.html",
    ):
        assert f"skipscope/{needed}" in names
    assert not [name for name in names if not name.startswith("skipscope")]
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "tests/conftest.py", "docs/index.md"} <= held
    assert not [
        name for name in held if re.match(r"docs/(_build|api|gallery)/|skipscope-out|.*__pycache__", name)
    ]

    # An empty environment with this wheel; what it depends on is lent by the present one.
    run(sys.executable, "-m", "venv", tmp_path / "user")
    python = tmp_path / "user" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    (packages,) = (tmp_path / "user" / "lib").glob("python*/site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "lent.pth").write_text("\n".join(lent))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = run(python, "-c", "import skipscope; print(skipscope.__file__)", cwd=tmp_path, env=clean)
    assert where.startswith(str(tmp_path))
    skipscope = tmp_path / "user" / "bin" / "skipscope"
    assert "9 shortcuts" in run(skipscope, "find", "resnet20", cwd=tmp_path, env=clean)
    run(skipscope, "play", cwd=tmp_path, env=clean)
    assert list(tmp_path.glob("skipscope-out/**/*.html"))
