"""Finding shortcuts: known counts over the families of the literature, names, and what surrounds a model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import skipscope as ss
from shortcuts.architectures import CASES, Basic, Layer, Lecture, ResNet, features, images, seq, sequences
from skipscope.shortcuts import Shortcuts, ablate, boundaries, find_shortcuts, mark_shortcut
from skipscope.shortcuts.trace import _operations


@pytest.mark.parametrize("name", CASES)
def test_known_counts(name):
    make, inputs, kinds = CASES[name]
    torch.manual_seed(0)
    found = find_shortcuts(make(), inputs)
    assert dict(Counter(s.kind for s in found)) == kinds
    assert len({s.name for s in found}) == len(found)


def resnet():
    return ResNet(Basic, [4, 8], [2, 2])


def test_names_kinds_and_sides_of_a_resnet():
    found = find_shortcuts(resnet(), images())
    assert [s.name for s in found] == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    assert [s.kind for s in found] == ["identity", "identity", "projection", "identity"]
    first, projected = found[0], found[2]
    assert first.branch == tuple(f"stages.0.0.{m}" for m in ("conv1", "bn1", "conv2", "bn2"))
    assert projected.shortcut == ("stages.1.0.downsample.0", "stages.1.0.downsample.1")
    assert first.fork == "bn1" and projected.fork == "stages.0.1.relu"
    assert first.merge == "stages.0.0 add" and first.source.startswith("convolutional.py:")
    assert first.sides == ("branch", "shortcut")
    assert [found.layers[i].name for i in first.span] == ["stages.0.0.conv1", "stages.0.0.bn2"]


def test_the_lectures_shortcuts_are_named_by_their_layers():
    found = find_shortcuts(Lecture([3, 3, 3, 3, 3, 1], True), features(2, 3))
    assert [s.name for s in found] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert [b.name for b in found.boundaries] == [
        "input",
        "layers.0",
        "layers.1",
        "layers.2",
        "layers.3",
        "layers.4.0",
    ]
    assert [b.kind for b in found.boundaries] == ["input", "merge", "merge", "merge", "merge", "module"]


def test_transformer_layers_are_named_by_attention_and_mlp():
    found = find_shortcuts(CASES["gpt2"][0](), CASES["gpt2"][1])
    assert [s.name for s in found] == [f"h.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    assert found.boundaries[0].name == "wte" and found.boundaries[0].kind == "input"


def test_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from architectures import CASES\nfrom skipscope.shortcuts import find_shortcuts\n"
        "make, inputs, _ = CASES['t5']\nprint(find_shortcuts(make(), inputs).to_dict())"
    )
    here = str(Path(__file__).parent)
    other = subprocess.run(
        [sys.executable, "-c", code, here], capture_output=True, text=True, check=True
    ).stdout
    make, inputs, _ = CASES["t5"]
    assert other.strip() == str(find_shortcuts(make(), inputs).to_dict())


def test_nothing_is_imported_that_an_answer_does_not_need():
    code = (
        "import sys, torch, skipscope as ss\n"
        "ss.find_shortcuts(torch.nn.Linear(2, 2), torch.ones(1, 2))\n"
        "print({'torch._dynamo', 'scipy.stats', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_sequence_that_selects_prints_and_survives_a_file(tmp_path):
    found = find_shortcuts(resnet(), images())
    assert len(found.select(kind="projection")) == 1
    assert [s.name for s in found.select(name="stages.1.*")] == ["stages.1.0", "stages.1.1"]
    assert found.select(kind=["identity", "projection"]) == found
    assert isinstance(found[1:], Shortcuts) and found[1:][0] == found[1]
    found.save(tmp_path / "found.json")
    assert ss.load(tmp_path / "found.json") == found
    assert "stages.0.0" in str(found) and "4 shortcuts" in str(found)


REASONS = {
    "gpt_hand_norm": {"no weights on either side", "an activation and a weight (position embedding or bias)"},
    "se_resnet": {"a gate: a product, not a sum"},
    "googlenet": {"parallel branches"},
    "lstm_stacked": {"stacked side by side"},
    "lstm_concatenated": {"steps of one recurrence, side by side"},
    "lora": {"a low-rank update of the same linear map"},
    "highway_difference": {"part of a gate"},
}


@pytest.mark.parametrize("name", REASONS)
def test_rejected_merges_have_their_reason(name):
    make, inputs, _ = CASES[name]
    rejected = find_shortcuts(make(), inputs).rejected
    assert REASONS[name] <= {r.reason for r in rejected}
    assert {r.source.partition(":")[0] for r in rejected} == {f"{make.__module__.rpartition('.')[2]}.py"}


# --- what surrounds a model ---


def kinds(found):
    return Counter(s.kind for s in found)


def test_frozen_parameters_and_no_grad():
    model = resnet().requires_grad_(False)
    with torch.no_grad():
        assert kinds(find_shortcuts(model, images())) == {"identity": 3, "projection": 1}
    with torch.inference_mode():
        x = images()
    assert kinds(find_shortcuts(model, x)) == {"identity": 3, "projection": 1}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    assert len(find_shortcuts(Layer().to(dtype), sequences().to(dtype))) == 2


def test_models_too_big_to_run_are_read_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(*[Layer(width=4096) for _ in range(2)])
    found = find_shortcuts(model, torch.zeros(1, 3, 4096))
    assert len(found) == 4


def test_compiled_and_wrapped_models():
    model = resnet()
    expected = find_shortcuts(model, images())
    compiled = torch.compile(model, backend="eager")
    assert find_shortcuts(compiled, images()) == expected
    compiled(images())
    assert find_shortcuts(compiled, images()) == expected
    assert find_shortcuts(nn.DataParallel(model), images()) == expected
    parts = seq(torch.compile(Layer(), backend="eager"), Layer())
    assert len(find_shortcuts(parts, sequences())) == 4
    in_place = Layer()
    in_place.compile(backend="eager")
    assert len(find_shortcuts(in_place, sequences())) == 2


class Checkpointed(nn.Module):
    def __init__(self, reentrant, whole):
        super().__init__()
        self.block, self.reentrant, self.whole = Layer(), reentrant, whole

    def forward(self, x):
        run = self.block if self.whole else lambda y: y + self.block.mlp(y)
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_both_kinds(reentrant):
    found = find_shortcuts(Checkpointed(reentrant, whole=True), sequences())
    assert len(found) == 2 and not any(s.blocked for s in found)
    loose = find_shortcuts(Checkpointed(reentrant, whole=False), sequences())
    assert len(loose) == 1 and "checkpoint" in (loose[0].blocked or "")


class Detaching(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.lin, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        if self.how == "detach":
            return x.detach() + self.lin(x)
        with torch.no_grad():
            y = self.lin(x)
        return x + y


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_a_shortcut_that_lets_no_gradient_through_is_one(how):
    assert kinds(find_shortcuts(Detaching(how), features())) == {"identity": 1}


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, g):
        return g, g


class Fused(nn.Module):
    def __init__(self, join=Opaque.apply):
        super().__init__()
        self.lin, self.join = nn.Linear(8, 8), join

    def forward(self, x):
        return self.join(x, self.lin(x))


def test_what_cannot_be_seen_is_listed():
    found = find_shortcuts(Fused(), features())
    assert len(found) == 0 and [o.name for o in found.opaque] == ["Opaque"]


def test_what_cannot_be_seen_can_be_declared():
    model = Fused(mark_shortcut(Opaque.apply, shortcut=0, branch=1))
    found, x = find_shortcuts(model, features()), features()
    assert [(s.name, s.kind) for s in found] == [("lin", "identity")] and not found.opaque
    assert torch.equal(ablate(model, found)(x), model.lin(x))
    assert torch.equal(ablate(model, found, "lesion")(x), x)
    assert torch.equal(ablate(model, found, "detach")(x), model(x))
    with pytest.raises(ss.SkipscopeError, match="no such argument"):
        mark_shortcut(lambda a, b: a + b, shortcut="x", branch="b")


def test_a_declaration_changes_nothing_global():
    before = dict(_operations.OPERATIONS)
    mark_shortcut(lambda a, b: a + b, shortcut="a", branch="b")
    assert before == _operations.OPERATIONS


def test_the_model_is_left_as_found():
    model, x = resnet(), images()
    before = copy.deepcopy(model.state_dict())
    find_shortcuts(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model._forward_hooks and all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


class Appending(nn.Module):
    """Appends to the cache that it is given, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x, cache):
        cache.seen.append(self.f(x))
        return x * torch.stack(cache.seen).mean(0) + self.f(x).tanh()


class Cache:
    def __init__(self):
        self.seen = [torch.ones(3, 8)]


def test_a_users_cache_is_the_same_for_each_pass_and_left_as_found():
    model, cache, x = Appending(), Cache(), features().float()
    find_shortcuts(model, (x, cache))
    split = ss.path_spectrum(model, ((x, cache), x), nn.functional.mse_loss)
    one, other = (ss.importance(model, ((x, cache), x), nn.functional.mse_loss).loss for _ in range(2))
    assert len(cache.seen) == 1 and split.residual < 1e-6 and one == other


def through_views(x):
    x.view(-1).mul_(2.0)
    x[0] = 1.0
    return nn.functional.relu(x, inplace=True)


def through_numpy(x):
    x.detach().numpy()[0] = 7.0
    return x


def under_vmap(x):
    torch.vmap(lambda row: row.add_(1.0))(x)
    return x


def with_its_own_gradient(x):
    x.add_(1.0).requires_grad_(True)
    return torch.autograd.grad(x.tanh().sum(), x, create_graph=True)[0]


def raising(x):
    x.add_(1.0)
    raise ValueError("no")


class Writing(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.f, self.write = nn.Linear(8, 8), write

    def forward(self, x):
        x = self.write(x)
        return x + self.f(x)


@pytest.mark.parametrize("write", [through_views, through_numpy, under_vmap, with_its_own_gradient, raising])
def test_an_input_is_not_copied_until_the_pass_writes_into_it_and_left_as_found(write):
    x = features().float()
    before, version = x.clone(), x._version
    if write is raising:
        with pytest.raises(ss.SkipscopeError, match="no"):
            find_shortcuts(Writing(write), x)
    else:
        found = find_shortcuts(Writing(write), x)
        assert len(found) == 1 and found.writes_inputs
    assert torch.equal(x, before) and x._version == version and not x.requires_grad


def test_an_input_that_is_only_read_is_read_where_it_is():
    seen, x = [], features()
    model = Writing(lambda x: seen.append(x.data_ptr()) or x)
    assert not find_shortcuts(model, x).writes_inputs and seen == [x.data_ptr()]


# --- boundaries ---


def test_cross_attention_feeds_a_branch_and_is_no_boundary():
    make, inputs, _ = CASES["t5"]
    names = [b.name for b in boundaries(make(), inputs)]
    assert names[0] == "shared" and not any(".k" in n or ".v" in n for n in names) and len(names) == 11


def test_boundaries_of_a_network_without_merges_are_its_layers():
    make, inputs, _ = CASES["vgg"]
    assert [b.kind for b in boundaries(make(), inputs)] == ["input"] + ["module"] * 5
