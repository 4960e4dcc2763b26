"""torch's private names: each is there, or is refused by its name; what can do without one gives the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import skipscope as ss
from skipscope import _torch_private

SOURCES = Path(_torch_private.__file__).parent


@pytest.mark.parametrize("name", _torch_private.NAMES)
def test_this_torch_has_the_name(name):
    assert callable(_torch_private.named(name))


def test_a_name_that_torch_lacks_is_refused_by_its_name():
    with pytest.raises(ss.SkipscopeError, match=r"torch\._C\._no_such_name") as refusal:
        _torch_private.named("_C._no_such_name")
    assert torch.__version__ in str(refusal.value) and "install" in str(refusal.value)


def test_no_other_file_reads_a_private_name_of_torch():
    private = re.compile(
        r"\b(torch|dist|functional)(\.\w+)*\._[a-zA-Z]|(from|import) torch[\w.]*\._|p\._(post_)?\w*hooks"
    )
    found = [
        f"{path.relative_to(SOURCES)}:{number}: {line.strip()}"
        for path in sorted(SOURCES.rglob("*.py"))
        if path.name != "_torch_private.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line.partition("#")[0]) and '"torch._' not in line
    ]
    assert found == []


def test_norms_and_copies_without_the_names_are_the_same(monkeypatch):
    tensors = [torch.randn(3, 4), torch.randn(5)]
    one = _torch_private.norms_of(tensors, 2, torch.float64)
    targets = [torch.zeros(3, 4), torch.zeros(5)]
    monkeypatch.delattr(torch, "_foreach_norm")
    monkeypatch.delattr(torch, "_foreach_copy_")
    other = _torch_private.norms_of(tensors, 2, torch.float64)
    assert [float(a) for a in one] == pytest.approx([float(b) for b in other], rel=1e-15)
    _torch_private.copy_each(targets, tensors)
    assert all(map(torch.equal, targets, tensors))


def test_nothing_is_looked_up_at_import():
    assert _torch_private.named.cache_info().maxsize is None
    text = Path(_torch_private.__file__).read_text()
    assert not re.search(r"^\w+ = (named|torch)\b", text, re.MULTILINE)


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_by_the_engine_are_those_of_the_public_call(batched, monkeypatch):
    x, unused = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    hidden = torch.tanh(x)
    roots = [hidden.sum(0) * 2, torch.autograd.graph.get_gradient_edge(hidden)]
    rows = [torch.randn(4), torch.randn(3, 4)]
    if batched:
        rows = [torch.stack([row, -row, 2 * row]) for row in rows]
    one = _torch_private.gradients(roots, [x, unused], rows, batched=batched)
    monkeypatch.setattr(
        _torch_private, "named", lambda path: (_ for _ in ()).throw(ss.SkipscopeError("torch", path))
    )
    other = _torch_private.gradients(roots, [x, unused], rows, batched=batched)
    assert one[0] is not None and other[0] is not None and torch.equal(one[0], other[0])
    assert one[1] is None and other[1] is None
