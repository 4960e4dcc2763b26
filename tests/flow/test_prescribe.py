"""Remedies do what they say on networks whose trouble is known, and leave the network alone."""

import copy

import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope.flow.advice._remedies import candidates
from skipscope.flow.advice._residual_blocks import ResidualBlock, block_places, residual_blocks

loss = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def vanishing():
    torch.manual_seed(0)
    model = ss.reference.deep_mlp(16, 16)
    before = copy.deepcopy(model.state_dict())
    advice = ss.prescribe(model, ss.reference.digits(32), loss, steps=5)
    return model, before, advice


def test_shortcuts_are_among_what_helps(vanishing):
    _, _, advice = vanishing
    assert advice.before.state == "vanishing" and advice.before.fall_decades > 5
    healthy = {r.name for r in advice.remedies if r.state == "healthy"}
    assert {
        "identity shortcuts",
        "depth-scaled shortcuts",
        "each layer's output scaled to variance 1 (LSUV)",
    } <= healthy
    assert advice.remedies[0].state == "healthy" and advice.remedies[0].reached < advice.before.reached
    assert advice.remedies[0].name in advice.advice
    assert not advice.refused


def test_the_network_is_as_found(vanishing):
    model, before, _ = vanishing
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_advice(vanishing):
    model, _, advice = vanishing
    again = ss.prescribe(model, ss.reference.digits(32), loss, steps=5)
    assert again == advice


def test_growing_branches_are_scaled():
    torch.manual_seed(0)
    model = ss.reference.deep_mlp(40, 16, shortcut="identity", init="he")
    advice = ss.prescribe(model, ss.reference.digits(32), loss, steps=0)
    assert advice.before.state == "exploding" and advice.before.reached is None
    rows = {r.name: r for r in advice.remedies}
    assert (
        rows["branches scaled by 1/sqrt(L)"].state == rows["branches that start at zero"].state == "healthy"
    )


def test_a_healthy_network_is_told_so():
    advice = ss.prescribe(ss.reference.deep_mlp(3, 16, init="he"), ss.reference.digits(16), loss, steps=0)
    assert "check the data, the learning rate and the initialisation" in advice.advice


def test_what_cannot_be_tried_is_said():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(64)[:, :10].clone())

        def forward(self, x):
            return x.flatten(1) @ self.w

    advice = ss.prescribe(Bare(), ss.reference.digits(16), loss, steps=0)
    assert len(advice.refused) >= 3 and all("Not tried" in line for line in advice.refused)


def relus(depth, norm=False):
    torch.manual_seed(0)
    width = lambda i: 20 if i == 0 else 32  # noqa: E731
    norms = [nn.BatchNorm1d(32)] * norm
    layers = [q for i in range(depth) for q in (nn.Linear(width(i), 32), *copy.deepcopy(norms), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def rows(n=32):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 20, generator=draw), torch.randint(0, 10, (n,), generator=draw)


# --- residual blocks around layers with norms ---


def conv(i, o, stride=1, act=nn.ReLU, groups=1, size=3, bias=False):
    layer = nn.Conv2d(i, o, size, stride, size // 2, groups=groups, bias=bias)
    return [layer, nn.BatchNorm2d(o), act()]


def head(width):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


class Layer(nn.Module):
    """Its activation is called by its code."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Loop(nn.Module):
    """Layers in a ModuleList; ``scaled``: the owner does more than to call them."""

    def __init__(self, scaled=False):
        super().__init__()
        self.stem = nn.Sequential(*conv(3, 8))
        self.blocks = nn.ModuleList(nn.Sequential(*conv(8, 8)) for _ in range(4))
        self.head, self.scaled = nn.Sequential(*head(8)), scaled

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x / (1 + len(list(block.children()))) if self.scaled else x
        return self.head(x)


class Apart(nn.Module):
    """Convolutions in one list, norms in another."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.head = nn.Sequential(*head(8))

    def forward(self, x):
        for layer, norm in zip(self.convs, self.norms):
            x = torch.relu(norm(layer(x)))
        return self.head(x)


def strided():
    widths = (3, 8, 8, 8, 16, 16, 16, 24, 24)
    strides = (1, 1, 1, 2, 1, 1, 2, 1)
    layers = [q for i, s in enumerate(strides) for q in conv(widths[i], widths[i + 1], s)]
    return nn.Sequential(*layers, *head(24))


def pooled():
    layers = [q for i in range(3) for q in conv(3 if i == 0 else 8, 8, bias=True)] + [nn.MaxPool2d(2)]
    layers += [q for i in range(2) for q in conv(8 if i == 0 else 16, 16, bias=True)]
    return nn.Sequential(*layers, *head(16))


def dropped():
    layers = [q for i in range(5) for q in (*conv(3 if i == 0 else 8, 8), nn.Dropout2d(0.2))]
    return nn.Sequential(*layers, *head(8))


def depthwise():
    layers = conv(3, 8)
    for i, o, stride in ((8, 8, 1), (8, 16, 2), (16, 16, 1)):
        layers += [*conv(i, i, stride, groups=i), *conv(i, o, size=1)]
    return nn.Sequential(*layers, *head(16))


def of_layers():
    return nn.Sequential(Layer(3, 8), Layer(8, 8), Layer(8, 8), Layer(8, 16, 2), Layer(16, 16), *head(16))


def unpadded():
    layers = [
        q for i in range(3) for q in (nn.Conv2d(3 if i == 0 else 8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    ]
    return nn.Sequential(*layers, *head(8))


def nested_rows():
    """Linear-norm-activation-dropout, each in a Sequential of its own."""
    layers = [
        nn.Sequential(nn.Linear(20 if i == 0 else 32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1))
        for i in range(4)
    ]
    return nn.Sequential(*layers, nn.Linear(32, 10))


class NormActivation(nn.Sequential):
    """As torchvision writes a layer."""

    def __init__(self, i, o):
        super().__init__(*conv(i, o))


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Sequential(*conv(3, 8), *conv(8, 8), *conv(8, 8)) for _ in range(2))
        self.head = nn.Sequential(*head(16))

    def forward(self, x):
        return self.head(torch.cat([self.left(x), self.right(x.flip(-1))], 1))


def with_a_head_of_two_layers():
    layers = [q for i in range(3) for q in conv(3 if i == 0 else 8, 8)]
    last = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def norm_last():
    layers = [
        q for i in range(3) for q in (nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(8))
    ]
    return nn.Sequential(*layers, *head(8))


# Network: where blocks are, the kinds of their shortcuts, what is said of the layers without one.
BLOCKS = {
    "strides": (
        strided,
        "3 to 8, 9 to 17 (projection, 8 x 8 x 8 to 16 x 4 x 4), 18 to 23 (projection, 16 x 4 x 4 to 24 x 2 x 2)",
        ["identity", "projection", "projection"], "0 (the first layer)",
    ),
    "pools, biases": (
        pooled, "3 to 8, 10 to 15 (projection, 8 x 4 x 4 to 16 x 4 x 4)", ["identity", "projection"],
        "0 (the first layer)",
    ),
    "dropout": (dropped, "4 to 10, 12 to 18", ["identity"] * 2, "0 (the first layer)"),
    "depthwise": (
        depthwise, "3 to 8, 9 to 14 (projection, 8 x 8 x 8 to 16 x 4 x 4), 15 to 20",
        ["identity", "projection", "identity"], "0 (the first layer)",
    ),
    "a ModuleList": (Loop, "blocks.0 to blocks.1, blocks.2 to blocks.3", ["identity"] * 2, "stem.0 (the first layer)"),
    "own modules": (
        of_layers, "1 to 2, 3 to 4 (projection, 8 x 8 x 8 to 16 x 4 x 4)", ["identity", "projection"],
        "0 (the first layer)",
    ),
    "a class of Sequential": (
        lambda: nn.Sequential(NormActivation(3, 8), NormActivation(8, 8), NormActivation(8, 8), *head(8)),
        "1 to 2", ["identity"], "0 (the first layer)",
    ),
    "two towers": (
        Towers, "left.3 to left.8, right.3 to right.8", ["identity"] * 2,
        "left.0 (the first layer), right.0 (the first layer)",
    ),
    "a head of two layers": (
        with_a_head_of_two_layers, "3 to 8", ["identity"], "0 (the first layer), 11 (the last layer)",
    ),
    "the norm after the activation": (norm_last, "3 to 8", ["identity"], "0 (the first layer)"),
    "rows": (lambda: relus(5, norm=True), "3 to 8, 9 to 14", ["identity"] * 2, "0 (the first layer)"),
    "rows, nested": (nested_rows, "1 to 3", ["identity"], "0 (the first layer)"),
}  # fmt: skip


def pictures(n=4):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=draw), torch.randint(0, 10, (n,), generator=draw)


@pytest.mark.parametrize("network", BLOCKS)
def test_residual_blocks_go_where_a_person_would_put_them(network):
    make, around, kinds, left = BLOCKS[network]
    torch.manual_seed(0)
    model, x = make(), (rows() if "rows" in network else pictures())[0]
    assert block_places(copy.deepcopy(model), x) == f"Around {around}. As they are: {left}."
    twin = residual_blocks(copy.deepcopy(model), x)
    assert [s.kind for s in ss.find_shortcuts(twin, x)] == kinds
    for block in twin.modules():
        if isinstance(block, ResidualBlock):
            block.bypass = False
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))


def test_a_block_is_the_one_that_one_writes_by_hand():
    torch.manual_seed(0)
    model, x = strided(), pictures()[0]
    twin = residual_blocks(copy.deepcopy(model), x)
    down, deeper = twin[9].projection, twin[18].projection
    assert down[0].stride == (2, 2) and isinstance(down[1], nn.BatchNorm2d)
    h = model[:3](x)
    h = torch.relu(model[3:8](h) + h)
    h = torch.relu(model[9:17](h) + down(h))
    h = torch.relu(model[18:23](h) + deeper(h))
    torch.testing.assert_close(twin(x), model[24:](h))


def test_dropout_stays_on_the_branch_between_two_layers():
    torch.manual_seed(0)
    model, x = nested_rows(), rows()[0]
    twin = residual_blocks(copy.deepcopy(dropped()), pictures()[0])
    assert [type(m).__name__ for m in twin[4].branch] == [
        "Conv2d", "BatchNorm2d", "ReLU", "Dropout2d", "Conv2d", "BatchNorm2d",
    ]  # fmt: skip
    assert isinstance(twin[11], nn.Dropout2d)
    block = residual_blocks(copy.deepcopy(model), x)[1]
    assert [type(m).__name__ for m in block.activation] == ["GELU", "Dropout"]


@pytest.mark.parametrize(
    "make, why",
    [
        (Apart, "no two layers with a norm each follow one another"),
        (lambda: Loop(scaled=True), "its owner does more than to call it"),
        (unpadded, "8 x 6 x 6 comes in, 8 x 2 x 2 goes out"),
    ],
)
def test_where_no_block_can_be_built_it_is_said(make, why):
    advice = ss.prescribe(make(), pictures(), loss, steps=0)
    assert any(line.startswith("Not tried: residual blocks") and why in line for line in advice.refused)
    assert not any("norm after each layer" in r.name for r in advice.remedies)


@pytest.mark.parametrize("image", [False, True])
def test_around_layers_with_norms_blocks_take_the_place_of_bare_shortcuts(image):
    torch.manual_seed(0)
    model, data = (strided(), pictures(8)) if image else (relus(5, norm=True), rows())
    advice = ss.prescribe(model, data, loss, steps=0)
    names = {r.name for r in advice.remedies}
    assert {"residual blocks (He et al. 2015)", "rezero shortcuts", "highway shortcuts"} <= names
    assert not {"identity shortcuts", "pre-norm shortcuts", "a norm after each layer"} & names
    assert advice.refused == ()
    assert not any("by hand" in note for note in advice.notes)  # nothing is named: the flow is healthy


def test_what_is_named_is_said_in_full():
    torch.manual_seed(0)
    layers = [q for i in range(30) for q in conv(3 if i == 0 else 8, 8)]
    advice = ss.prescribe(nn.Sequential(*layers, *head(8)), pictures(16), loss, steps=3)
    assert "Lowest loss after a few steps: residual blocks" in advice.advice
    (by_hand,) = [note for note in advice.notes if "by hand" in note]
    assert "x = act(y + x)" in by_hand and "Around 3 to 8, 9 to 14" in by_hand
    assert "(14 in all)" in by_hand and by_hand.endswith("As they are: 0 (the first layer).")


# --- frozen parts, and trouble that no shortcut mends ---


def test_no_shortcut_goes_around_frozen_layers():
    torch.manual_seed(0)
    model, data = strided(), pictures()
    model[:9].requires_grad_(False)
    assert block_places(copy.deepcopy(model), data[0]).endswith(
        "As they are: 0 (the first layer), 3 (frozen), 6 (frozen)."
    )
    shortcut = next(c for c in candidates(0) if c.name == "identity shortcuts")
    plain = relus(5)
    plain[:6].requires_grad_(False)
    twin = shortcut.apply(copy.deepcopy(plain), rows()[0])
    assert [name for name, m in twin.named_modules() if isinstance(m, ss.nn.IdentityShortcut)] == ["6", "8"]
    assert shortcut.places is not None
    assert shortcut.places(copy.deepcopy(plain), rows()[0]).startswith(
        "Around 6, 8. As they are: 0 (32 x 20 comes in, 32 x 32 goes out), 2 (frozen), 4 (frozen)"
    )


def test_a_linear_probe_is_left_alone():
    model = strided()
    model[:-1].requires_grad_(False)
    advice = ss.prescribe(model, pictures(), loss, steps=0)
    assert advice.remedies == () == advice.refused
    assert advice.advice.startswith("Only the last layer is trained.")


def test_stale_statistics_are_mended_before_anything_is_tried():
    model = strided().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e4)
    advice = ss.prescribe(model, pictures(), loss, steps=0)
    assert advice.remedies == () and "ss.recalibrate(model, data)" in advice.advice
    assert any("running variance" in note for note in advice.notes)


def test_a_tiny_last_layer_is_initialised_anew():
    torch.manual_seed(0)
    model = strided()
    with torch.no_grad():
        model[-1].weight.mul_(1e-7)
    advice = ss.prescribe(model, pictures(16), loss, steps=2)
    best = advice.remedies[0]
    assert best.name == "the last layer reinitialised" and best.state == "healthy"
    assert [r.state for r in advice.remedies[1:]] == ["vanishing"] * (len(advice.remedies) - 1)
    assert "flow vanishing -> healthy" in advice.advice


def test_broken_data_are_told_from_broken_weights_where_statistics_have_met_them():
    x, y = pictures()
    x[0, 0, 0, 0] = float("nan")
    advice = ss.prescribe(strided(), (x, y), loss, steps=0)
    assert "Remove the samples that are not finite." in advice.advice and advice.remedies == ()


def test_a_critic_with_a_gradient_penalty():
    torch.manual_seed(0)
    layers = [q for i in range(4) for q in (nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2))]  # fmt: skip
    critic = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 1))

    @ss.objective
    def penalised(model, batch):
        real, fake = batch
        mixed = ((real + fake) / 2).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return model(fake).mean() - model(real).mean() + 10 * penalty

    advice = ss.prescribe(critic, (pictures()[0], torch.rand(4, 3, 8, 8)), penalised, steps=2)
    blocks = next(r for r in advice.remedies if r.name.startswith("residual blocks"))
    assert blocks.state == "healthy" and blocks.reached is not None and not advice.refused


def test_frozen_layers_keep_their_weights():
    model = relus(4)
    model[:4].requires_grad_(False)
    for one in candidates(0)[:3]:
        changed = one.apply(copy.deepcopy(model), rows()[0])
        same = [torch.equal(a.weight, b.weight) for a, b in zip(model[::2], changed[::2])]
        assert same == [True, True, False, False, True], one.name
    advice = ss.prescribe(model, rows(), loss, steps=0)
    assert "2 frozen layers keep their weights." in advice.notes
    assert any("what trained layers have learnt is lost" in note for note in advice.notes)


def test_no_recipe_where_the_data_or_the_graph_are_broken():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 32), nn.Linear(32, 10)

        def forward(self, x):
            return self.b(self.a(x).detach())

    x, y = rows()
    bad = x.clone()
    bad[0] = float("nan")
    for model, data, cure in ((relus(2), (bad, y), "not finite"), (Cut(), (x, y), "detach")):
        advice = ss.prescribe(model, data, loss, steps=2)
        assert advice.remedies == () and not any("by hand" in note for note in advice.notes)
        assert advice.advice.startswith("No remedy for the network can help.") and cure in advice.advice


def test_where_all_end_where_they_began_it_is_said():
    x, _ = rows()
    constant = lambda output, target: 1e4 + 1e-9 * output.square().mean()  # noqa: E731
    advice = ss.prescribe(relus(2), (x, torch.zeros(len(x))), constant, steps=2)
    assert advice.advice.startswith("Nothing that was tried brings the loss down")


def test_an_objective_that_differentiates_inside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    @ss.objective
    def residual(model, batch):
        q = batch[0].detach().requires_grad_()
        u = model(q)
        (du,) = torch.autograd.grad(u.sum(), q, create_graph=True)
        return (du - torch.cos(q)).square().mean() + u[0].square().sum()

    advice = ss.prescribe(model, (torch.linspace(0, 1, 8)[:, None], torch.zeros(8, 1)), residual, steps=2)
    assert advice.before.reached is not None and advice.remedies and not advice.refused


@pytest.mark.parametrize("kind", [ValueError, AssertionError])
def test_own_code_that_fails_without_a_word_in_a_copy_is_a_remedy_that_was_not_tried(kind):
    left = [24]  # the next pass is one of those that train a copy

    class Tires(nn.Sequential):
        def forward(self, x):
            left[0] -= 1
            if left[0] < 0:
                raise kind
            return super().forward(x)

    torch.manual_seed(0)
    model = Tires(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))
    advice = ss.prescribe(model, (torch.randn(6, 8), torch.arange(6) % 3), loss, steps=2)
    assert left[0] < 0 and advice.refused and all(kind.__name__ in why for why in advice.refused)


def test_an_embedding_with_sparse_gradients_is_trained_with_the_same_numbers():
    def advice(sparse):
        torch.manual_seed(0)
        layers = [layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())]
        model = nn.Sequential(nn.Embedding(10, 6, sparse=sparse), *layers, nn.Linear(6, 3))
        return ss.prescribe(model, (torch.arange(9) % 10, torch.arange(9) % 3), loss, steps=5)

    assert advice(True).before.reached == advice(False).before.reached < 2


def test_the_first_layer_is_the_one_that_runs_first_and_a_gate_is_none_of_the_block_s():
    class Gated(nn.Module):
        """Its gate over the channels is linear, as Hu et al. 2018 write it."""

        def __init__(self, i, o):
            super().__init__()
            self.body, self.gate = nn.Sequential(*conv(i, o, 2)), nn.Linear(o, o)

        def forward(self, x):
            x = self.body(x)
            return x * self.gate(x.mean((2, 3))).sigmoid()[..., None, None]

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.Sequential(Gated(8, 16), Layer(16, 16)), nn.Linear(16, 4)
            self.stem = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.head(self.layers(self.stem(x)).mean((2, 3)))

    places = block_places(Late(), pictures()[0])
    assert places == "Around layers.0 to layers.1 (projection, 8 x 8 x 8 to 16 x 4 x 4)."


def test_every_name_that_is_a_term_is_said_in_words():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) for _ in range(6)], nn.Linear(8, 3))
    found = ss.prescribe(model, (torch.randn(16, 8), torch.arange(16) % 3), loss, steps=1)
    (note,) = [note for note in found.notes if note.startswith("What the names say: ")]
    assert "layer-sequential unit variance (Mishkin and Matas 2016)" in note
    assert "divided by the standard deviation of the layer's output" in note
    for remedy in found.remedies:
        is_plain = remedy.name == "a norm after each layer" or " and " in remedy.name
        assert is_plain or f"{remedy.name}: " in note
    assert "rezero shortcuts: y = x + " in note and "powers of ten" in str(found)


def test_a_linear_probe_is_told_how_to_let_the_others_learn():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    found = ss.prescribe(model, (torch.randn(16, 8), torch.arange(16) % 3), loss, steps=1)
    assert "requires_grad_(True)" in found.advice and not found.remedies
