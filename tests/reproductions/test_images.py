"""What the reproductions on images measure, held against closed forms and against hand-made networks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reproductions._report import Options
from torch import nn

import skipscope as ss
from reproductions import _images, he, li_depth, li_sharpness, li_trajectories, veit

QUICK = Options(range(1), "quick")


def test_paths_through_linear_blocks_are_binomial():
    blocks, gain, width = 6, 0.3, 4
    kept = [ss.nn.IdentityShortcut(nn.Linear(width, width, bias=False)) for _ in range(blocks)]
    for block in kept:
        block.branch.weight.data = gain * torch.eye(width)
    model = nn.Sequential(*kept, nn.Linear(width, 3))
    data = torch.randn(8, width), torch.arange(8) % 3
    norms = ss.path_spectrum(model, data, F.cross_entropy).norms
    binomial = [math.comb(blocks, k) * gain**k for k in range(blocks + 1)]
    assert np.allclose(norms / norms[0], binomial, rtol=1e-4)
    assert veit.mean_length(norms) == pytest.approx(blocks * gain / (1 + gain), rel=1e-4)
    # Single paths of one length are all alike here, so the sampled estimate is exact.
    found = ss.find_shortcuts(model, data[0])
    singles = [[veit.single_path(model, found, set(range(k)), data)] for k in range(blocks + 1)]
    assert np.allclose(veit.sampled({"blocks": blocks, "singles": singles}), norms, rtol=1e-4)
    assert veit.fit({"singles": singles}).slope == pytest.approx(math.log10(gain), rel=1e-3)


def test_a_single_path_leaves_the_forward_pass_and_gives_one_term_of_the_product():
    torch.manual_seed(0)
    first, second = (ss.nn.IdentityShortcut(nn.Linear(3, 3, bias=False)) for _ in range(2))
    model, data = nn.Sequential(first, second), (torch.randn(5, 3), torch.randn(5, 3))
    found = ss.find_shortcuts(model, data[0])
    output = model(data[0]).detach().requires_grad_()
    [back] = torch.autograd.grad(F.cross_entropy(output, data[1].argmax(1)), output)
    a, b = first.branch.weight, second.branch.weight
    for branches, path in (({0}, back @ a), ({1}, back @ b), ({0, 1}, back @ b @ a), (set(), back)):
        norm = veit.single_path(model, found, branches, (data[0], data[1].argmax(1)))
        assert norm == pytest.approx(float(path.detach().norm()), rel=1e-5)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_a_block_taken_out_joins_its_input_to_its_output(shortcuts):
    spec = {"depth": 14, "widths": [4, 4, 8], "cifar": None, "shortcuts": shortcuts}
    torch.manual_seed(0)
    whole = _images.PreResNet(14, [4, 4, 8]).eval()
    model = whole if shortcuts else _images.plain(whole)
    x = _images.images(None, "test")[0][:16]
    found = ss.find_shortcuts(whole, x)

    def by_hand(gone):
        h = whole.stem(x)
        for i, block in enumerate(whole.blocks):
            h = block.write(h, 0) if i in gone else block(h) if shortcuts else block.branch(h)
        return whole.head(F.relu(whole.norm(h)).mean((2, 3)))

    for gone in ([1], [2], [0, 3, 4]):  # block 4 changes the shape
        lesioned = veit.without_blocks(spec, model, found, gone)
        assert torch.allclose(lesioned(x), by_hand(gone), atol=1e-5)
        assert not torch.allclose(lesioned(x), by_hand([]), atol=1e-3)


def test_filter_normalised_sharpness_does_not_see_a_rescaling_before_batch_norm():
    setting = {"samples": 64}
    net, _ = li_sharpness.network(li_sharpness.specification(QUICK, "small", 0.0, 0))
    doubled, data = li_sharpness.rescaled(net, 2.0), _images.images(None, "train")
    assert torch.allclose(net(data[0][:32]), doubled(data[0][:32]), atol=1e-4)

    def rises(span, normalize):
        return [li_sharpness.rise(n, data, span, setting, normalize=normalize) for n in (net, doubled)]

    own, other = rises(0.5, "filter")
    assert other == pytest.approx(own, rel=1e-3)
    own, other = rises(0.05, "none")
    assert abs(other) < 0.5 * abs(own)


def test_kinds_of_shortcuts_are_those_of_the_table():
    base = {"depth": 8, "widths": [4, 4, 8], "cifar": None}
    x = _images.images(None, "test")[0][:16]

    def output(kind):
        torch.manual_seed(3)
        return he.network({**base, "kind": kind}).eval()(x)

    torch.manual_seed(3)
    model = _images.resnet(8, [4, 4, 8]).eval()
    assert torch.equal(output(he.IDENTITY), model(x))
    assert torch.allclose(output("0.5 x + F"), ss.ablate(model, inputs=x, strength=0.5)(x), atol=1e-5)
    assert torch.allclose(output("none"), ss.ablate(model, inputs=x)(x), atol=1e-5)
    assert torch.allclose(output("dropout 0.5"), model(x), atol=1e-5)  # in evaluation mode
    far = {kind: (output(kind) - model(x)).abs().max().item() for kind in he.KINDS if kind != "dropout 0.5"}
    assert far.pop("shortcut-only gate, bias -6") < 0.05  # a gate that is all but open
    assert min(far.values()) > 0.05, far


def test_a_trained_network_is_kept_and_the_same_when_it_is_trained_again(tmp_path, monkeypatch):
    spec = {**li_depth.specification(QUICK, 8, True, 0), "trajectory": True}

    def make():
        return _images.resnet(8, spec["widths"])

    monkeypatch.setattr(_images, "KEPT", tmp_path)
    first, way = _images.trained(make, spec)
    kept, again = _images.trained(make, spec)
    for file in tmp_path.iterdir():
        file.unlink()
    anew, _ = _images.trained(make, spec)
    weights = [net.state_dict() for net in (first, kept, anew)]
    assert all(torch.equal(weights[0][n], w[n]) for w in weights[1:] for n in w)
    assert len(way) == len(again) == spec["epochs"]
    torch.manual_seed(0)
    assert all(torch.equal(way[0][n], p) for n, p in make().named_parameters())  # before the first epoch


def test_the_share_of_a_path_that_directions_hold():
    model = nn.Linear(3, 2)
    step = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    line = [{n: p + s * step[n] for n, p in model.named_parameters()} for s in (1.0, 2.0, -0.5)]
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    assert li_trajectories.share_on(model, line, [step, other]) == pytest.approx(1.0)
    assert li_trajectories.share_on(model, line, [other]) < 0.999


def test_cifar_is_read_from_its_binary_version_and_augmented_by_shifts_and_mirrors(tmp_path):
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        rows = generator.integers(0, 256, (8, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(8)
        rows.tofile(tmp_path / name)
    inputs, target = _images.images(str(tmp_path), "train")
    assert inputs.shape == (40, 3, 32, 32) and target[:8].tolist() == list(range(8))
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5
    batch = inputs[:6]
    moved = _images.augmented(batch, torch.Generator().manual_seed(0))
    padded = F.pad(batch, (4, 4, 4, 4))
    for image, own in zip(moved, padded):
        crops = [own[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, c) or torch.equal(image, c.flip(2)) for c in crops)
    spec = {**li_depth.specification(QUICK, 8, True, 0), "cifar": str(tmp_path), "epochs": 1, "batch": 8}
    model, _ = _images.trained(lambda: _images.resnet(8, spec["widths"], str(tmp_path)), spec)
    assert set(_images.accuracy(model, str(tmp_path))) >= {"train_loss", "test_error"}
