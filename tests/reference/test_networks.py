"""The reference networks: published parameter counts, the lecture's rule, and initialisations."""

import math

import pytest
import torch
import torch.nn.functional as F

from skipscope import SkipscopeError, reference


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "make, count",
    [
        (lambda: reference.resnet20(in_channels=3, option="A"), 269_722),
        (lambda: reference.resnet32(in_channels=3, option="A"), 464_154),
        (lambda: reference.resnet56(in_channels=3, option="A"), 853_018),
        (lambda: reference.resnet110(in_channels=3, option="A"), 1_727_962),
        (lambda: reference.resnet20(in_channels=3), 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)),
        (lambda: reference.resnet18(1000, 3, large_images=True), 11_689_512),
        (lambda: reference.gpt(12, 768, 12, 50257, 1024), 124_439_808),
        (lambda: reference.deep_mlp(30, 64), 30 * 64 * 65 + 650),
    ],
)
def test_published_counts(make, count):
    with torch.device("meta"):
        assert size(make()) == count


@pytest.mark.parametrize("name", reference.networks())
def test_every_named_network_has_its_data_and_a_gradient_everywhere(name):
    torch.manual_seed(0)
    model, (inputs, target) = reference.networks()[name](), reference.data_for(name, 4)
    F.cross_entropy(model(inputs), target).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("scale, factor", [(1.0, 1.0), (0.3, 0.3), ("depth", 1 / math.sqrt(5))])
def test_deep_mlp_follows_the_lectures_rule(scale, factor):
    model = reference.deep_mlp(5, 8, inputs=6, classes=3, shortcut="identity", scale=scale).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    h = model.layers[0](x)  # 6 -> 8: no shortcut
    for layer in model.layers[1:]:
        h = h + factor * layer(h)
    torch.testing.assert_close(model(x), model.head(h))


def test_twins_share_names_and_weights():
    twins = []
    for options in ({}, {"shortcut": "identity"}, {"shortcut": "identity", "scale": "depth"}):
        torch.manual_seed(1)
        twins.append(reference.deep_mlp(4, **options).state_dict())
    for twin in twins[1:]:
        assert twin.keys() == twins[0].keys()
        assert all(torch.equal(twin[k], twins[0][k]) for k in twin)


def test_he_initialisation():
    torch.manual_seed(0)
    model = reference.deep_mlp(4, 256, inputs=256, init="he")
    for layer in model.layers:
        assert layer[0].weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
        assert not layer[0].bias.any()


def test_gpt2_initialisation_and_tied_head():
    torch.manual_seed(0)
    model = reference.gpt(8, 64, 4)
    assert model.lm_head.weight is model.wte.weight
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert model.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_gpt_looks_back_only():
    model = reference.gpt(2, 16, 2).eval()
    ids = torch.randint(256, (1, 10))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 256
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :, :6], b[:, :, :6])
    assert not torch.allclose(a[:, :, 6:], b[:, :, 6:])


def test_option_a_carries_the_input():
    x = torch.randn(2, 16, 8, 8)
    block = reference.resnet20(option="A").stages[1][0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)).relu()
    torch.testing.assert_close(block(x), expected)


def test_resnets_read_flat_and_square_images_alike():
    model = reference.resnet20().eval()
    torch.testing.assert_close(model(reference.digits(3)[0]), model(reference.digits(3, image=True)[0]))


def test_deep_mlp_wraps_its_layers_in_any_registered_shortcut():
    model = reference.deep_mlp(4, 8, inputs=6, shortcut="highway")
    assert [type(layer).__name__ for layer in model.layers] == ["Sequential"] + 3 * ["Highway"]
    assert reference.deep_mlp(4, 8, shortcut="rezero")(torch.randn(2, 64)).shape == (2, 10)


@pytest.mark.parametrize("options", [{"shortcut": "none"}, {"init": "xavier"}, {"activation": "swish"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(SkipscopeError, match=next(iter(options))):
        reference.deep_mlp(2, **options)
