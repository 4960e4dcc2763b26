"""Adding shortcuts: the lecture's rule, spans, projections, every kind, and what is said of each stretch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from skipscope._errors import SkipscopeError
from skipscope.nn import registry
from skipscope.shortcuts import ablate, add_shortcuts, find_shortcuts

sys.path.insert(0, str(Path(__file__).parent))
from architectures import Lecture, double, features, images, seq


def test_the_lectures_rule_gives_the_lectures_network():
    plain, x = Lecture([3, 3, 3, 3, 1], False), features(2, 3)
    built = Lecture([3, 3, 3, 3, 1], True)
    built.load_state_dict(plain.state_dict())
    twin = add_shortcuts(plain, x, report=None)
    assert torch.equal(twin(x), built(x)) and not torch.equal(plain(x), built(x))
    assert [s.kind for s in find_shortcuts(twin, x)] == ["identity"] * 3
    assert torch.equal(ablate(twin, inputs=x)(x), plain(x))


def test_spans_and_reasons():
    model = nn.Sequential(*[seq(nn.Linear(8, 8), nn.ReLU()) for _ in range(5)], nn.Linear(8, 2))
    lines: list[str] = []
    twin = add_shortcuts(model, features(), span=2, where=lambda path: path == "", report=lines.append)
    assert len(find_shortcuts(twin, features())) == 2
    assert lines[0] == "0 to 1: wrapped, identity"
    assert lines[2] == "4 to 5: not wrapped: 3 x 8 comes in, 3 x 2 goes out"
    x = features()
    y = x + model[1](model[0](x))
    y = y + model[3](model[2](y))
    torch.testing.assert_close(twin(x), model[5](model[4](y)))
    assert (
        len(find_shortcuts(add_shortcuts(model, x, where="0", report=None), x)) == 1
    )  # inside the first layer


def test_it_prints_by_default(capsys):
    add_shortcuts(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), features())
    assert capsys.readouterr().out == "0: wrapped, identity\n1: not wrapped: it holds no weights\n"


def test_projections_where_the_width_changes():
    twin = add_shortcuts(Lecture([8, 8, 6, 4], False), features(), "projection", report=None)
    assert [s.kind for s in find_shortcuts(twin, features())] == ["projection"] * 3


@pytest.mark.parametrize("kind", registry())
def test_every_shortcut_module_serves_as_kind(kind):
    if kind == "dense":
        pytest.skip("makes the layers after it wider")
    model = nn.Sequential(*[seq(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)])
    assert add_shortcuts(model, features(), kind, report=None)(features()).shape == (3, 8)


def test_convolutions_and_a_function_as_kind():
    model = nn.Sequential(double(3, 3), double(3, 3))
    twin = add_shortcuts(model, images(), lambda branch: registry()["rezero"](branch, 3, dim=1), report=None)
    assert len(find_shortcuts(twin, images())) == 2


def test_refusals():
    with pytest.raises(SkipscopeError, match="unknown kind"):
        add_shortcuts(nn.Sequential(nn.Linear(8, 8)), features(), "skip")
    with pytest.raises(SkipscopeError, match="at least one layer"):
        add_shortcuts(nn.Sequential(nn.Linear(8, 8)), features(), span=0)
