"""With torch and numpy alone (``pip install --no-deps``) one can find, edit, measure and watch."""

import subprocess
import sys

CODE = """
import sys
ABSENT = {"scipy", "cattrs", "attrs", "attr", "cyclopts", "matplotlib", "rich", "safetensors", "zarr", "numcodecs"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())

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

from skipscope.monitor._gradient_norms import on_host
norms = on_host([torch.full((3,), 1e-30), torch.full((4,), 1e30), torch.zeros(2), torch.full((2,), float("inf"))])[0]
assert abs(norms[0] / (3**0.5 * 1e-30) - 1) < 1e-6 and abs(norms[1] / 2e30 - 1) < 1e-6
assert norms[2] == 0 and norms[3] == float("inf")
large = torch.linspace(-1, 2, 200_001)  # read in pieces
norm, total = on_host([large])[:, 0]
assert abs(norm / large.double().norm() - 1) < 1e-6 and abs(total / large.double().abs().sum() - 1) < 1e-5
print("light")
"""


def test_torch_and_numpy_are_enough_to_find_edit_measure_and_watch():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("light")
