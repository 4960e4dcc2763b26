"""Edited twins: equal to hand-written ones, forward and backward, and modules like any other."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shortcuts.architectures import (
    CASES,
    HIGHWAYS,
    SCALED,
    WRITINGS,
    Basic,
    DenseNet,
    Highway,
    Layer,
    Lecture,
    ResidualMLP,
    ResNet,
    SharedLoop,
    UNet,
    features,
    images,
    seq,
    sequences,
)
from skipscope._errors import SkipscopeError
from skipscope.shortcuts import ablate, find_shortcuts, recalibrate, tap_boundaries, tap_merges

EDITS = {
    "remove": {},
    "detach": {"how": "detach"},
    "lesion": {"how": "lesion"},
    "strength": {"strength": 0.3},
}


def edit_of(x, how):
    """What the shortcut becomes, by the table in definitions.md."""
    return {"remove": lambda: x * 0, "detach": x.detach, "lesion": lambda: x, "strength": lambda: 0.3 * x}[
        how
    ]()


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y = y["logits"] if isinstance(y, dict) else y
    return y, torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True)


def agree(one, other, x):
    """Forward and backward; a gradient that is zero may also be none."""
    y, gs = gradients(one, x)
    z, hs = gradients(other, x)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    for g, h in zip(gs, hs, strict=True):
        zero = torch.zeros_like(g if g is not None else h) if (g is not None or h is not None) else None
        if zero is not None:
            torch.testing.assert_close(
                zero if g is None else g, zero if h is None else h, rtol=1e-10, atol=1e-10
            )


class HandResidual(ResidualMLP):
    """As built, but x is edited where it is the shortcut, and the branch where it is lesioned."""

    how = "remove"

    def forward(self, x):
        h = torch.relu(self.a(x))
        if self.how != "lesion":
            return self.write(self, edit_of(x, self.how), h)
        b = self._modules.pop("b")
        try:
            self.__dict__["b"] = lambda h: b(h) * 0
            return self.write(self, x, h)
        finally:
            del self.__dict__["b"]
            self.b = b


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("writing", [*WRITINGS, *SCALED])
def test_every_way_of_writing_it_equals_the_hand_written_twin(writing, how):
    if writing == "dropped":
        pytest.skip("draws new numbers in every run")
    if writing in {"addmm", "baddbmm"} and how == "lesion":
        pytest.skip("the hand-written lesion is below")
    write = {**WRITINGS, **SCALED}[writing]
    model, x = ResidualMLP(write).double(), features().double()
    hand = HandResidual(write).double()
    hand.load_state_dict(model.state_dict())
    hand.how = how
    agree(ablate(model, inputs=x, **EDITS[how]), hand, x)


@pytest.mark.parametrize("writing", ["addmm", "baddbmm"])
def test_lesion_of_a_product_inside_the_call(writing):
    model, x = ResidualMLP(WRITINGS[writing]).double(), features().double()
    assert torch.equal(ablate(model, inputs=x, how="lesion")(x), x)


class HandHighway(Highway):
    how = "remove"

    def forward(self, x):
        for h, t in zip(self.h, self.t, strict=True):
            H, T = torch.relu(h(x)), torch.sigmoid(t(x))
            x = T * (0 * H if self.how == "lesion" else H) + (1 - T) * edit_of(x, self.how)
        return x


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("form", HIGHWAYS)
def test_a_gate_however_written(form, how):
    model, x = Highway(HIGHWAYS[form]).double(), features().double()
    hand = HandHighway(None).double()
    hand.load_state_dict(model.state_dict())
    hand.how = how
    agree(ablate(model, inputs=x, **EDITS[how]), hand, x)


class HandBasic(Basic):
    how = "remove"

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        skip = x if self.downsample is None else self.downsample(x)
        return torch.relu((out * 0 if self.how == "lesion" else out) + edit_of(skip, self.how))


class HandLayer(Layer):
    how = "remove"

    def forward(self, x):
        for part, norm in ((self.attn, self.n1), (self.mlp, self.n2)):
            f = part(norm(x))
            x = edit_of(x, self.how) + (f * 0 if self.how == "lesion" else f)
        return x


class HandLecture(Lecture):
    how = "remove"

    def forward(self, x):
        for layer in self.layers:
            f = layer(x)
            x = edit_of(x, self.how) + (f * 0 if self.how == "lesion" else f) if x.shape == f.shape else f
        return x


HANDS = {
    "resnet": (
        lambda: ResNet(Basic, [4, 8], [2, 2]),
        lambda: ResNet(HandBasic, [4, 8], [2, 2]),
        HandBasic,
        images(),
    ),
    "transformer": (
        lambda: seq(Layer(), Layer()),
        lambda: seq(HandLayer(), HandLayer()),
        HandLayer,
        sequences(),
    ),
    "lecture": (
        lambda: Lecture([3, 3, 3, 1], True),
        lambda: HandLecture([3, 3, 3, 1], True),
        HandLecture,
        features(2, 3),
    ),
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("family", HANDS)
def test_families_equal_hand_written_twins(family, how):
    make, make_hand, kind, x = HANDS[family]
    model, hand, x = make().double(), make_hand().double(), x.double()
    hand.load_state_dict(model.state_dict())
    for module in hand.modules():
        if isinstance(module, kind):
            module.how = how
    agree(ablate(model, inputs=x, **EDITS[how]), hand, x)


class HandUNet(UNet):
    how = "remove"

    def merge(self, skip, x):
        return torch.cat([edit_of(skip, self.how), x * 0 if self.how == "lesion" else x], 1)


@pytest.mark.parametrize("how", EDITS)
def test_concatenation_is_cut_by_zeros(how):
    model, hand, x = UNet().double(), HandUNet().double(), images().double()
    hand.load_state_dict(model.state_dict())
    hand.how = how
    agree(ablate(model, inputs=x, **EDITS[how]), hand, x)


# --- over every architecture ---

RANDOM = {"shake_shake", "stochastic_depth", "vae", "scaled_dropped", "wide_resnet"}
WITH_SHORTCUTS = [name for name, (_, _, kinds) in CASES.items() if kinds and name != "densenet121"]


def call(model, inputs):
    torch.manual_seed(0)
    out = (
        model(**inputs)
        if isinstance(inputs, dict)
        else model(*inputs)
        if isinstance(inputs, tuple)
        else model(inputs)
    )
    return out["logits"] if isinstance(out, dict) else out


@pytest.mark.parametrize("name", WITH_SHORTCUTS)
def test_neutral_edits_change_no_bit_and_the_others_do(name):
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    found = find_shortcuts(model, inputs)
    expected = call(model, inputs)
    for neutral in ({"strength": 1.0}, {"how": "detach"}):
        assert torch.equal(call(ablate(model, found, **neutral), inputs), expected)
    for how in ("remove", "lesion"):
        twin = ablate(model, found, how)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert not torch.equal(call(twin, inputs), expected)
    assert torch.equal(call(model, inputs), expected)


@pytest.mark.parametrize("name", WITH_SHORTCUTS)
def test_taps_see_each_merge_and_boundary_once(name):
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    found = find_shortcuts(model, inputs)
    for one in (model, ablate(model, found)):
        expected, merges, points = call(one, inputs), [], []
        # A gate is handed over as t H + (1 - t) x, however it is written: the same but for rounding.
        near = dict.fromkeys(("rtol", "atol"), 1e-6 if any("both" in s.sides for s in found) else 0)

        def at_merge(k, merge, merges=merges):
            merges += [] if merge.later else [k]
            assert len(merge.sides) == len(merge.operands)
            torch.testing.assert_close(merge.recompute(merge.operands), merge.output, rtol=0, atol=0)
            return merge.output

        def at_point(i, activation, points=points):
            points.append(i)
            return activation

        with tap_merges(one, found, at_merge):
            torch.testing.assert_close(call(one, inputs), expected, **near)
        with tap_boundaries(one, found.boundaries, at_point):
            torch.testing.assert_close(call(one, inputs), expected, rtol=0, atol=0)
        assert sorted(merges) == list(range(len(found)))
        assert sorted(points) == list(range(len(found.boundaries)))


# --- a module like any other ---


def resnet():
    return ResNet(Basic, [4, 8], [2, 2]).eval()


def test_copies_files_and_composition():
    model, x = resnet(), images()
    found = find_shortcuts(model, x)
    twin = ablate(model, found)
    assert type(twin).__name__ == "ResNet" and isinstance(twin, ResNet)
    y = twin(x)
    assert torch.equal(copy.deepcopy(twin)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), y)
    stream = io.BytesIO()
    torch.save(twin, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), y)
    step = ablate(ablate(model, found[:2]), found[2:])
    assert torch.equal(step(x), y)
    halves = ablate(ablate(model, found, strength=0.5), found, strength=0.5)
    assert torch.equal(halves(x), ablate(model, found, strength=0.25)(x))
    assert len(find_shortcuts(twin, x)) == 0
    assert torch.equal(ablate(resnet(), found)(x).isfinite(), torch.ones_like(y, dtype=torch.bool))
    other = resnet()
    other.load_state_dict(model.state_dict())
    assert torch.equal(ablate(other, found)(x), y)


def test_twins_of_twins_do_not_mix():
    model, x = resnet(), images()
    found = find_shortcuts(model, x)
    twin = ablate(model, found[:1])
    again = copy.deepcopy(twin)
    both = seq(ablate(Layer(), inputs=sequences()), ablate(Layer(), inputs=sequences(), how="lesion"))
    assert torch.equal(both(sequences()), both[0](sequences()))
    assert torch.equal(again(x), twin(x)) and not torch.equal(twin(x), model(x))


def test_functional_call_vmap_and_autocast():
    model, x = seq(Layer(), Layer()), sequences()
    twin = ablate(model, inputs=x)
    parameters = {k: v.detach() for k, v in twin.named_parameters()}
    assert torch.equal(torch.func.functional_call(twin, parameters, (x,)), twin(x))
    stacked = {k: torch.stack([v, v * 2]) for k, v in parameters.items()}
    out = torch.vmap(lambda p: torch.func.functional_call(twin, p, (x,)))(stacked)
    doubled = torch.func.functional_call(twin, {k: v * 2 for k, v in parameters.items()}, (x,))
    torch.testing.assert_close(out, torch.stack([twin(x), doubled]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ablate(model, inputs=x, strength=1.0)(x), model(x))


def test_training_with_accumulation_and_checkpointing():
    model, x = seq(Layer(), Layer()), sequences()
    twin = ablate(model, inputs=x)
    plain = torch.autograd.grad(twin(x).sum(), list(twin.parameters()), allow_unused=True)
    for reentrant in (True, False):
        y = x.clone().requires_grad_()
        for layer in twin:
            y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=reentrant)
        twin.zero_grad()
        y.sum().backward()
        for p, g in zip(twin.parameters(), plain, strict=True):
            assert (p.grad is None) == (g is None) and (g is None or torch.allclose(p.grad, g))
    optimizer = torch.optim.SGD(twin.parameters(), 0.01)
    before = twin(x)
    optimizer.step()
    assert not torch.equal(twin(x), before) and twin.train().training


def test_strength_may_be_a_tensor_with_a_gradient():
    model, x = resnet().double(), images().double()
    found = find_shortcuts(model, x)
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    twin = ablate(model, found, strength=strength)
    (slope,) = torch.autograd.grad(twin(x).square().sum(), strength)
    step = 1e-6
    up, down = (ablate(model, found, strength=0.7 + s)(x).square().sum() for s in (step, -step))
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_loop_that_runs_longer_than_the_traced_one():
    model = SharedLoop()
    found = find_shortcuts(model, features(3))
    twin = ablate(model, found)
    x = features(6)
    y = x
    for _ in range(7):
        y = model.block(y)
    assert torch.equal(twin(x), model.head(y))


def test_shared_parameters():
    model, x = resnet(), images()
    twin = ablate(model, inputs=x, share=True)
    assert all(p is q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(b is not c for b, c in zip(model.buffers(), twin.buffers(), strict=True))
    for change in (twin.half, twin.double, lambda: twin.to(torch.float64)):
        with pytest.raises(SkipscopeError, match="shares its parameters"):
            change()


def test_recalibration():
    model, x = resnet(), images()
    twin = ablate(model, inputs=x)
    recalibrate(twin, x)
    twin.train()
    expected = twin(x)
    again = recalibrate(ablate(model, inputs=x), x)
    assert torch.allclose(again.eval().bn1.running_mean, again.conv1(x).mean((0, 2, 3)), atol=1e-6)
    assert expected.isfinite().all()


# --- compiled ---

COMPILED = [
    "lecture",
    "resnet18",
    "densenet",
    "unet",
    "gpt2",
    "t5",
    "swin",
    "highway_difference",
    "highway_lerp",
    "highway_multiplied_out",
    "highway_stacked",
    "highway_stacked_einsum",
]


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_graph_break(name, how):
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make().eval()
    found = find_shortcuts(model, inputs)
    twin = ablate(model, found[::2], **EDITS[how])
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled, inputs), call(twin, inputs), rtol=0, atol=0)


class Attended(nn.Module):
    """Attention residuals (2603.15031): the stack makes its own weights."""

    def __init__(self):
        super().__init__()
        self.lin, self.query = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        stack = torch.stack([x, torch.tanh(self.lin(x))])
        return (stack * self.query(stack).softmax(0)).sum(0)


def test_a_stack_that_makes_its_own_weights_is_found_and_refused_with_the_reason():
    model, x = Attended(), features()
    found = find_shortcuts(model, x)
    assert [s.kind for s in found] == ["gated"]
    with pytest.raises(SkipscopeError, match="such as its weights"):
        ablate(model, found)


# --- refusals ---


def test_refusals_name_the_cure():
    model, x = resnet(), images()
    found = find_shortcuts(model, x)
    with pytest.raises(SkipscopeError, match="neither found= nor inputs="):
        ablate(model)
    with pytest.raises(SkipscopeError, match="two edits at once"):
        ablate(model, found, how="lesion", strength=0.5)
    with pytest.raises(SkipscopeError, match="unknown edit"):
        ablate(model, found, "cut")
    with pytest.raises(SkipscopeError, match="not a shortcut"):
        ablate(model, ["stages.0.0"])
    with pytest.raises(SkipscopeError, match="another architecture"):
        ablate(Layer(), found)


def test_other_code_than_the_traced_is_refused_not_left_in():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.other = nn.Linear(8, 8), False

        def forward(self, x):
            if self.other:
                return self.lin(x) + x
            return x + self.lin(x)

    model, x = Fickle(), features()
    twin = ablate(model, inputs=x)
    assert torch.equal(twin(x), model.lin(x))
    twin.other = True
    with pytest.raises(SkipscopeError, match="ran other code"):
        twin(x)


def test_dense_blocks_are_cut_one_by_one():
    model, x = DenseNet().eval(), images()
    found = find_shortcuts(model, x)
    outputs = [ablate(model, [s])(x) for s in found]
    assert all(not torch.equal(a, model(x)) for a in outputs)
    assert len({o.sum().item() for o in outputs}) == len(found)


@pytest.mark.parametrize("used", [0, 1, 3])
def test_a_module_in_a_row_whose_weights_alone_are_used_is_no_other_depth(used):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rows = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            for i, layer in enumerate(self.rows):
                x = x + (F.linear(x, layer.weight, layer.bias) if i == used else layer(x)).tanh()
            return x

    net, x = Net(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = find_shortcuts(net, x)
    assert len(found) == 4 and found.weights_used == (f"rows.{used}",) and not found.not_run
    expected = x
    for layer in net.rows:
        expected = layer(expected).tanh()
    torch.testing.assert_close(ablate(net, found)(x), expected)
    net.rows.append(nn.Linear(6, 6))
    with pytest.raises(SkipscopeError, match=r"rows\.4"):
        ablate(net, found)
