"""The faults of today's tools, each as a test that this one passes (the rest are in test_directions and test_landscape)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces import random_direction


def _batch(n=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.randint(4, (n,), generator=generator)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))


def test_a_larger_span_goes_further_loss_landscapes_inverts_distance():
    near, far = (ss.landscape(_model(), _batch(), F.cross_entropy, grid=5, span=s) for s in (0.1, 1.0))
    assert np.ptp(far.values) > np.ptp(near.values)
    moved = [p for n, p in _model().named_parameters() if n in random_direction(_model())]
    size = torch.cat([p.flatten() for p in moved]).norm().item()
    step = torch.cat([d.flatten() for d in random_direction(_model()).values()]).norm().item()
    assert (
        far.provenance.span_in_weights[0]
        == pytest.approx(step / size, rel=1e-5)
        == pytest.approx(1, rel=1e-5)
    )
    assert near.provenance.span_in_weights[0] == pytest.approx(0.1, rel=1e-5)


def test_evaluation_mode_is_the_default_losscape_never_calls_eval():
    model = _model().train()
    surfaces = [ss.landscape(model, _batch(), F.cross_entropy, grid=3) for _ in range(2)]
    model.eval()
    assert surfaces[0].values[1, 1] == F.cross_entropy(model(_batch()[0]), _batch()[1]).item()
    assert np.array_equal(surfaces[0].values, surfaces[1].values)


def test_running_statistics_are_never_moved_nor_updated_loss_landscape_3d_adds_noise_to_them():
    model = _model()
    before = [b.clone() for b in model.buffers()]
    for mode in ("frozen", "batch", "recalibrate"):
        ss.landscape(model, _batch(), F.cross_entropy, grid=3, batch_norm=mode)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers()))


@pytest.mark.parametrize("constant", [0.0, -3.0, float("nan"), float("inf")])
def test_what_is_computed_is_not_told_by_its_value_goldsteins_code_recomputes_zeros_and_never_nan(
    tmp_path, constant
):
    calls = []

    def loss(output, target):
        calls.append(1)
        return output.sum() * 0 + constant

    for _ in range(2):
        calls.clear()
        surface = ss.landscape(_model(), _batch(), loss, grid=7, store=tmp_path / "s", strategy="plain")
        assert surface.computed.all() and np.array_equal(
            surface.values, np.full((7, 7), constant), equal_nan=True
        )
    assert len(calls) < 20


def test_a_zero_bound_is_a_bound_goldsteins_code_refuses_it():
    surface = ss.landscape(
        _model(), _batch(), F.cross_entropy, grid=(5, 3), span=((-1, 1), (0, 2)), strategy="plain"
    )
    square = ss.landscape(_model(), _batch(), F.cross_entropy, grid=(5, 5), span=(1, 2), strategy="plain")
    assert np.array_equal(surface.values, square.values[:, 2:])


def test_the_data_is_read_once_others_read_it_again_at_every_point():
    class Counted:
        reads = 0

        def __iter__(self):
            self.reads += 1
            generator = torch.Generator().manual_seed(
                self.reads
            )  # and a loader that shuffles gives other data each time
            x = torch.randn(24, 6, generator=generator)
            yield x[:12], torch.zeros(12, dtype=torch.long)
            yield x[12:], torch.ones(12, dtype=torch.long)

    data = Counted()
    surface = ss.landscape(_model(), data, F.cross_entropy, grid=5)
    assert data.reads <= 2 and surface.checks.passed  # once to see that there is data, once to keep it


def test_no_noise_is_added_anywhere_and_maxima_stay():
    """landscaper adds noise to maxima."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    data = torch.ones(4, 1).double(), torch.zeros(4, 1).double()
    surface = ss.landscape(model, data, F.mse_loss, grid=(9,), directions=[{"weight": torch.ones(1, 1)}])
    assert np.array_equal(surface.values, (1 + surface.alphas) ** 2)


# --- any task ---


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_segmentation_has_a_standard_error_over_images():
    torch.manual_seed(0)
    model, x, y = Segmenter(), torch.randn(8, 3, 6, 6), torch.randint(4, (8, 6, 6))
    surface = ss.landscape(model, (x, y), F.cross_entropy, grid=3)
    each = F.cross_entropy(model(x), y, reduction="none").mean((1, 2)).double()
    assert surface.stderr[1, 1] == pytest.approx((each.std() / 8**0.5).item(), rel=1e-4)


class Carries(nn.Module):
    """An output that carries its loss, and a batch of keywords."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x=None, labels=None):
        logits = self.inner(x)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def test_keyword_batches_and_losses_of_the_output():
    x, y = _batch()
    surface = ss.landscape(Carries(), {"x": x, "labels": y}, grid=3)
    assert surface.stderr is None and "sample_loss" in surface.why_no_stderr
    told = ss.landscape(
        Carries(), {"x": x, "labels": y}, grid=3,
        sample_loss=lambda output, labels: F.cross_entropy(output["logits"], labels, reduction="none"),
    )  # fmt: skip
    assert told.stderr is not None and told.stderr.shape == (3, 3)


def test_metrics_are_read_in_the_same_pass():
    model, (x, y) = _model(), _batch()
    right = lambda output, target: (output.argmax(1) == target).double().mean()  # noqa: E731
    surface = ss.landscape(model, ss.batches([(x[:16], y[:16]), (x[16:], y[16:])]), F.cross_entropy, grid=3,
                           metrics={"accuracy": right})  # fmt: skip
    assert surface.metrics["accuracy"][1, 1] == pytest.approx(
        (model.eval()(x).argmax(1) == y).double().mean().item()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_precision(dtype):
    model, (x, y) = _model().to(dtype), _batch()
    surface = ss.landscape(model, (x.to(dtype), y), F.cross_entropy, grid=3)
    assert surface.checks.passed and str(dtype).removeprefix("torch.") in surface.provenance.dtype
    # Other tolerances than the dtype's own rounding would hide a float64 path.
    tight = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert surface.checks.filter_norm_ratio == pytest.approx(1, abs=tight)


@pytest.mark.heavy
def test_a_language_model_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(64, (6, 16))
    surface = ss.landscape(model, {"input_ids": ids, "labels": ids}, grid=3)
    own = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert surface.values[1, 1] == own and surface.checks.passed
    name, weight = (
        "transformer.h.0.attn.c_attn.weight",
        model.get_parameter("transformer.h.0.attn.c_attn.weight"),
    )
    columns = random_direction(model)[name].norm(
        dim=0
    )  # Conv1D computes x W: its output channels are columns
    assert torch.allclose(columns, weight.norm(dim=0), rtol=1e-4)


def test_hessian_eigenvectors_as_directions():
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 1).double()
    ends = ss.extreme_eigenvalues(model, (x, y), F.mse_loss, vectors=True)
    line = ss.landscape(model, (x, y), F.mse_loss, grid=(3,), directions=[ends.direction("largest")])
    curvature = line.values[0] - 2 * line.values[1] + line.values[2]
    assert curvature == pytest.approx(float(np.ravel(ends.largest)[0]), rel=1e-3)
