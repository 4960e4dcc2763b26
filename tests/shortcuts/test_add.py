"""Adding shortcuts: the lecture's rule, spans, projections, every kind, and what is said of each stretch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shortcuts.architectures import Lecture, double, features, images, seq
from skipscope import nn as shortcuts
from skipscope._errors import SkipscopeError
from skipscope.nn import registry
from skipscope.shortcuts import ablate, add_shortcuts, find_shortcuts


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


# --- the twin runs, and the original's code runs in it ---


@pytest.mark.parametrize("training", [True, False])
def test_an_owner_that_reads_its_layers_attributes_finds_them(training):
    x = torch.randn(2, 5, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training)
    expected = x
    for one in encoder.layers:
        expected = expected + one(expected)
    torch.testing.assert_close(add_shortcuts(encoder, x, report=None)(x), expected)


class Owner(nn.Module):
    """Calls its layers, and does something else with them that ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.layers, self.how = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), how

    def forward(self, x):
        for layer in self.layers:
            if self.how == "attribute":
                x = torch.tanh(layer(x)) / layer.out_features**0.5
            elif self.how == "default":
                x = layer(x) * getattr(layer, "in_features", 1)
            elif self.how == "class":
                x = torch.tanh(layer(x)) if isinstance(layer, nn.Linear) else -layer(x)
            elif self.how == "weights":
                x = x @ self.layers[0][0].weight if isinstance(self.layers[0], nn.Sequential) else layer(x)
            else:
                x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("how", ["attribute", "default"])
def test_attributes_of_a_wrapped_layer_are_its_own(how):
    model, x = Owner(how), features()
    y = x
    for layer in model.layers:
        y = torch.tanh(y + layer(y)) / 8**0.5 if how == "attribute" else (y + layer(y)) * 8
    torch.testing.assert_close(add_shortcuts(model, x, report=None)(x), y)


def test_layers_whose_owner_does_more_than_call_them_are_left_alone_and_told():
    model, lines = nn.ModuleDict({"a": Owner("class"), "b": Owner("")}), []

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["b"](self.parts["a"](x))

    twin = add_shortcuts(Both(), features(), report=lines.append)
    assert [type(layer).__name__ for layer in twin.parts["a"].layers] == ["Linear"] * 3
    assert [type(layer).__name__ for layer in twin.parts["b"].layers] == ["IdentityShortcut"] * 3
    assert sum("its owner does more than call it" in line for line in lines) == 3


@pytest.mark.parametrize(
    "kind, layer",
    [
        ("dense", "0"),
        (lambda branch: shortcuts.PreNorm(branch, 7), "0"),
        (lambda branch: nn.Linear(8, 7), "0"),
    ],
)
def test_a_kind_whose_width_does_not_fit_is_refused_with_the_cure(kind, layer):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    with pytest.raises(SkipscopeError, match="does not fit here") as refusal:
        add_shortcuts(model, features(), kind, report=None)
    assert "keeps the width" in refusal.value.cure and f"layer:    {layer}" in str(refusal.value)


# --- what a stretch is ---


def vgg():
    def layer(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(
        *layer(3, 8), *layer(8, 8), nn.MaxPool2d(2), *layer(8, 8), *layer(8, 8), nn.MaxPool2d(2)
    )


@pytest.mark.parametrize("span", [1, 3])
def test_shortcuts_go_around_layer_norm_and_activation(span):
    """Whether three children are asked for or one: never around a norm alone, and in step after a pool."""
    model, x = vgg().eval(), torch.randn(2, 3, 8, 8)
    y = model[:3](x)
    for start in (3, 6, 7, 10):
        y = model[6](y) if start == 6 else y + model[start : start + 3](y)
    torch.testing.assert_close(add_shortcuts(model, x, span=span, report=None)(x), model[13](y))


def test_before_activation_the_norm_comes_first():
    layers = [[nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)] for _ in range(2)]
    model, x = nn.Sequential(*layers[0], *layers[1]).eval(), torch.randn(2, 4, 6, 6)
    twin = add_shortcuts(model, x, span=3, report=None)
    assert [type(m).__name__ for m in twin][::3] == ["IdentityShortcut"] * 2


# --- kinds by class, with their own arguments, and over depth ---


def test_a_class_is_a_kind_and_takes_its_own_arguments():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), features()
    for kind in (shortcuts.LayerScale, "layer-scale"):
        twin = add_shortcuts(model, x, kind, init=0.5, report=None)
        assert twin[1].gamma.tolist() == [0.5] * 8
    with pytest.raises(SkipscopeError, match="no such argument"):
        add_shortcuts(model, x, "rezero", bias=3, report=None)


def test_a_kind_that_spans_depth_is_made_over_the_chain():
    """Trained hyper-connections: the streams live from the first layer to the last."""
    layers = [seq(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)), features()
    twin = add_shortcuts(model, x, "hyper", streams=3, report=None)
    chain = twin[0]
    assert len(chain.layers) == 4 and not any(True for m in twin[1:4] for _ in m.parameters())
    with torch.no_grad():
        for layer in chain.layers:
            for p in (layer.pre, layer.post, layer.residual):
                p.add_(torch.randn_like(p))
    X = x.expand(3, *x.shape)
    for own, layer in zip(layers, chain.layers):
        f = own(torch.einsum("s,snw->nw", layer.pre, X))
        X = torch.einsum("ts,snw->tnw", layer.residual, X) + torch.einsum("t,nw->tnw", layer.post, f)
    torch.testing.assert_close(twin(x), model[4](X.mean(0)), rtol=1e-4, atol=1e-5)


def test_a_kind_that_spans_depth_is_refused_where_nothing_follows():
    with pytest.raises(SkipscopeError, match="joins layers that follow one another"):
        add_shortcuts(Owner(""), features(), "hyper", report=None)


@pytest.mark.parametrize("kind", [name for name, kind in registry().items() if kind.spans_depth])
def test_every_kind_that_spans_depth_joins_all_layers(kind):
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), features()
    twin = add_shortcuts(model, x, kind, report=None)
    assert sum(isinstance(m, nn.Identity) for m in twin) == 3 and twin(x).shape == x.shape


# --- networks of other styles ---


class ReadsSizes(nn.Module):
    """The owner reads its layers' attributes to make tensors, and their methods."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.GRUCell(8, 8) if i == 1 else nn.Linear(8, 8) for i in range(3))

    def forward(self, x):
        start = torch.zeros(len(x), self.layers[1].hidden_size)
        x = self.layers[0](x) * self.layers[0].weight.norm()
        return self.layers[2](self.layers[1](x, start))


def by_hand_of_sizes(model, x):
    first, cell, last = model.layers
    x = (x + first(x)) * first.weight.norm()
    x = cell(x, torch.zeros(len(x), 8))  # it takes two tensors
    return x + last(x)


def linear_norm_tanh(count, width=8):
    return [part for _ in range(count) for part in (nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh())]


def by_hand_of_linear_norms(model, x):
    for i in range(0, 9, 3):
        x = x + model[i : i + 3](x)
    return model[9](x)


def by_hand_of_convolutions(model, x):
    x = model[:4](x)
    for start in (4, 7):
        x = x + model[start : start + 3](x)
    return model[10:](x)


class Named(nn.Module):
    """Stages by name in a ModuleDict, each a Sequential, the width changes between them."""

    def __init__(self):
        super().__init__()
        stage = {"a": (8, 8), "b": (8, 6), "c": (6, 6)}
        self.stages = nn.ModuleDict({k: seq(nn.Linear(a, b), nn.GELU()) for k, (a, b) in stage.items()})

    def forward(self, x):
        for stage in self.stages.values():
            x = stage(x)
        return x


def by_hand_of_names(model, x):
    a, b, c = model.stages.values()
    x = a[1](x + a[0](x))
    x = b(x)
    return c[1](x + c[0](x))


def by_hand_of_spans(model, x):
    """Spans of two: the first child changes the width, so the windows begin one later."""
    x = model[0](x)
    for i in (1, 3):
        x = x + model[i : i + 2](x)
    return model[5](x)


class TimeFirst(nn.Module):
    """A recurrent layer among others gives a tuple and is left alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.GRU(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        x = self.layers[0](x)
        x, _ = self.layers[1](x)
        return self.layers[2](x)


def by_hand_of_time(model, x):
    first, middle, last = model.layers
    x = middle(x + first(x))[0]
    return x + last(x)


OTHER_STYLES = {
    "an owner that reads sizes and weights": (ReadsSizes, (3, 8), 1, by_hand_of_sizes),
    "linear, norm, activation": (
        lambda: nn.Sequential(*linear_norm_tanh(3), nn.Linear(8, 2)), (3, 8), 1, by_hand_of_linear_norms,
    ),
    "convolutions around a pool": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            *[m for _ in range(2) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())],
            nn.Flatten(), nn.Linear(36, 2),
        ), (2, 3, 6, 6), 1, by_hand_of_convolutions,
    ),
    "stages by name": (Named, (3, 8), 1, by_hand_of_names),
    "windows past the first layer": (
        lambda: nn.Sequential(nn.Linear(4, 8), *[nn.Linear(8, 8) for _ in range(4)], nn.Linear(8, 2)), (3, 4), 2, by_hand_of_spans,
    ),
    "a layer that gives a tuple": (TimeFirst, (5, 2, 8), 1, by_hand_of_time),
}  # fmt: skip


@pytest.mark.parametrize("style", OTHER_STYLES)
def test_networks_of_other_styles_get_the_shortcuts_that_a_person_would_write(style):
    torch.manual_seed(0)
    make, shape, span, by_hand = OTHER_STYLES[style]
    model, x = make().eval(), torch.randn(shape)
    twin = add_shortcuts(model, x, span=span, report=None)
    torch.testing.assert_close(twin(x), by_hand(model, x))
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("last", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()])
def test_what_changes_the_shape_after_a_norm_stays_outside(last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), last).eval()
    x = torch.randn(2, 4, 6, 6)
    twin = add_shortcuts(model, x, report=None)
    torch.testing.assert_close(twin(x), last(x + model[1](model[0](x))))
