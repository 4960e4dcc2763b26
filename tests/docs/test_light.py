"""With torch and numpy alone (``pip install --no-deps``) one can find, edit, measure and watch."""

import os
import subprocess
import sys

import pytest

# All that is not torch's or NumPy's own.
OTHERS = {
    "scipy",
    "cattrs",
    "attrs",
    "attr",
    "cyclopts",
    "matplotlib",
    "rich",
    "safetensors",
    "zarr",
    "numcodecs",
}
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
CODE = """
import torch
import torch.nn.functional as F
import skipscope as ss
from skipscope import reference

torch.manual_seed(0)
model, data = reference.deep_mlp(4, shortcut="identity"), reference.digits(32)
found = ss.find_shortcuts(model, data[0])
plain = ss.ablate(model, found)
print(found, ss.gradient_flow(model, data, F.cross_entropy), ss.gradient_flow(plain, data, F.cross_entropy).verdict)
assert len(ss.path_spectrum(model, data, F.cross_entropy).norms) == 5
assert len(ss.gradient_split(model, data, F.cross_entropy)) == len(ss.importance(model, data, F.cross_entropy)) == 4
assert len(ss.find_shortcuts(ss.add_shortcuts(plain, data[0], report=None), data[0])) == 4
ss.rewire(model, found, kind="rezero")(data[0])

optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
with ss.watch(model, optimizer, flow_every=1) as monitor:
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
expected = torch.stack([p.grad.norm() for p in model.parameters()]).numpy()
assert abs(monitor.history.norm[-1] / expected - 1).max() < 1e-5
assert monitor.verdict.state == "healthy", monitor.verdict

from skipscope.monitor.recording._gradient_norms import on_host
norms = on_host([torch.full((3,), 1e-30), torch.full((4,), 1e30), torch.zeros(2), torch.full((2,), float("inf"))])[0]
assert abs(norms[0] / (3**0.5 * 1e-30) - 1) < 1e-6 and abs(norms[1] / 2e30 - 1) < 1e-6
assert norms[2] == 0 and norms[3] == float("inf")
large = torch.linspace(-1, 2, 200_001)  # read in pieces
norm, total = on_host([large])[:, 0]
assert abs(norm / large.double().norm() - 1) < 1e-6 and abs(total / large.double().abs().sum() - 1) < 1e-5
print("light")
"""


# Rows of the table "What needs which package" in docs/promises.md: code, and what it needs beside torch and NumPy.
START = """
import torch
import torch.nn.functional as F
import skipscope as ss
model, data = ss.reference.deep_mlp(3, width=8, shortcut="identity"), ss.reference.digits(16)
small = torch.nn.Linear(64, 10)
"""
ROWS = {
    "surfaces and curvature": (
        """
ss.paired_landscapes({"a": model, "b": ss.ablate(model, inputs=data[0])}, data, F.cross_entropy, grid=5)
ss.extreme_eigenvalues(small, data, F.cross_entropy)
ss.curvature_map(small, data, F.cross_entropy, grid=3)
ss.spectral_density(small, data, F.cross_entropy, probes=2, steps=5)
""",
        {"scipy"},
    ),
    "pages and tables": (
        """
for ending in ("html", "csv", "tex", "json"):
    ss.gradient_flow(model, data, F.cross_entropy).save(f"flow.{ending}")
with ss.progress():
    ss.train_twins({"a": model}, data, F.cross_entropy, seeds=1, steps=2)
""",
        set(),
    ),
    "pictures": ("ss.gradient_flow(model, data, F.cross_entropy).save('flow.svg')", {"matplotlib"}),
    "load": (
        "print(ss.load(ss.gradient_flow(model, data, F.cross_entropy).save('flow.json')))",
        {"cattrs", "attrs", "attr"},
    ),
    "stores": (
        "ss.landscape(model, data, F.cross_entropy, grid=5, store='surface.zarr')",
        {"scipy", "zarr", "numcodecs"},
    ),
}


def run(code, present, folder):
    absent = f"ABSENT = {OTHERS - present!r}" + ABSENT
    return subprocess.run(
        [sys.executable, "-c", absent + code], capture_output=True, text=True, timeout=200, cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip


def test_torch_and_numpy_are_enough_to_find_edit_measure_and_watch(tmp_path):
    done = run(CODE, set(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("light")


@pytest.mark.parametrize(
    "row", [row if row == "pages and tables" else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)
def test_a_row_needs_the_packages_that_the_table_names(row, tmp_path):
    code, needed = ROWS[row]
    done = run(START + code, needed, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("row", [row for row, (_, needed) in ROWS.items() if needed])
def test_without_them_the_package_is_named(row, tmp_path):
    code, needed = ROWS[row]
    done = run(START + code, {"scipy"} & needed if row == "stores" else set(), tmp_path)
    assert done.returncode and any(f"{name}" in done.stderr.splitlines()[-1] for name in needed), done.stderr
