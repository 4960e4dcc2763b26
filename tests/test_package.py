"""The package as a user meets it: what is public, what an import pulls in, examples that run."""

import doctest
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import skipscope as ss

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = [
    m.name for m in pkgutil.walk_packages(ss.__path__, "skipscope.") if not m.name.endswith("__main__")
]
# Adapters of packages that may not be installed; their own tests run them.
# Each needs a package of its own; the kernels need Triton.
OPTIONAL = {
    f"skipscope.monitor.{name}" for name in ("lightning", "transformers", "accelerate", "recording._kernels")
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    return set(python(f"import sys\n{code}\nprint(*sys.modules)").split())


def test_every_public_name_is_there_documented_and_they_are_few():
    assert sum(name.islower() for name in ss.__all__) < 40
    for name in ss.__all__:
        value = getattr(ss, name)
        assert (value.__doc__ or "").strip(), f"ss.{name} has no docstring"


def test_importing_is_immediate():
    modules = imported("import skipscope")
    assert not modules & {"torch", "numpy", "matplotlib", "scipy", "rich", "zarr"}


def test_help_does_not_import_torch():
    modules = imported(
        "import contextlib, io; sys.argv = ['skipscope', 'compare', '--help']; out = io.StringIO()\n"
        "from skipscope.cli import main\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): main()\n"
    )
    assert "cyclopts" in modules
    assert "torch" not in modules


def test_the_core_imports_no_plotting_and_no_logger():
    rooms = ["comparison", "surfaces", "curvature", "flow", "shortcuts", "reference", "nn", "book", "testing"]
    code = "".join(
        f"import skipscope.{room} as room\nfor name in getattr(room, '__all__', []): getattr(room, name)\n"
        for room in rooms
    )
    modules = imported(code)
    assert "torch" in modules
    assert not modules & {
        "matplotlib",
        "scipy",
        "tensorboard",
        "wandb",
        "lightning",
        "transformers",
        "ray",
        "IPython",
    }


def test_nothing_is_imported_that_an_answer_does_not_need():
    call = "ss.landscape(nn.Linear(2, 1), (torch.randn(4, 2), torch.randn(4, 1)), nn.functional.mse_loss, grid=3)"
    modules = imported(f"import torch\nfrom torch import nn\nimport skipscope as ss\n{call}")
    assert "skipscope.surfaces._landscape" in modules
    unused = {"skipscope.curvature", "skipscope.surfaces.maps._curvature_map", "skipscope.shortcuts.finding"}
    assert not modules & {*unused, "skipscope.flow", "scipy.ndimage", "zarr", "matplotlib"}


def test_a_lazy_name_that_is_not_there_is_refused_as_python_does():
    import skipscope.flow as flow

    with pytest.raises(AttributeError, match=r"module 'skipscope\.flow' has no attribute 'shortcut_flow'"):
        flow.shortcut_flow


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OPTIONAL])
def test_examples_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_the_version_is_written_once():
    assert ss.__version__ in (ROOT / "CITATION.cff").read_text()
    assert f"[{ss.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_benchmark_that_make_bench_runs_has_figures():
    from benchmarks.__main__ import runnable

    assert {"find", "landscape", "small_grids", "curvature_memory", "waiting"} <= set(runnable())
    for name in runnable():
        assert callable(importlib.import_module(f"benchmarks.{name}").figures)


def test_the_audit_looks_up_every_package_that_an_install_brings():
    lines = (ROOT / "requirements-audit.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    brought, waiting = set(), [re.split(r"[^\w.-]", line)[0] for line in PROJECT["dependencies"]]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in brought or name.startswith(("nvidia-", "cuda-", "triton")):  # of torch for GPUs alone
            continue
        brought.add(name)
        needs = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"torch", "numpy", "cyclopts"} <= brought <= pinned
