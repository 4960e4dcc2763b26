"""Options at their edges: a grid of one point, spans of every form, metrics that an interpolation must not invent."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss

X, Y = (
    torch.randn(40, 6, generator=torch.Generator().manual_seed(0)),
    torch.randint(4, (40,), generator=torch.Generator().manual_seed(1)),
)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))


@pytest.mark.parametrize("grid", [1, (1,), (1, 1)])
def test_one_point_is_the_middle(grid):
    surface = ss.landscape(_model(), (X, Y), F.cross_entropy, grid=grid, strategy="plain")
    assert surface.alphas.tolist() == [0.0] and surface.values.item() == surface.checks.model_loss


def test_a_span_may_be_a_number_on_one_axis_and_two_ends_on_the_other():
    options: Any = {"grid": (3, 4), "strategy": "plain"}
    mixed = ss.landscape(_model(), (X, Y), F.cross_entropy, span=(0.7, (-0.2, 0.9)), **options)
    both = ss.landscape(_model(), (X, Y), F.cross_entropy, span=((-0.7, 0.7), (-0.2, 0.9)), **options)
    assert np.array_equal(mixed.values, both.values) and mixed.betas[[0, -1]].tolist() == [-0.2, 0.9]


@pytest.mark.parametrize("span", [0.0, (0.0, 1.0), ((0.5, 0.5), (0.0, 1.0)), -1.0, "wide", None])
def test_a_span_of_nothing_is_refused(span):
    with pytest.raises(ss.SkipscopeError, match="this is not a span"):
        ss.landscape(_model(), (X, Y), F.cross_entropy, grid=5, span=span)


def test_an_interpolated_accuracy_is_never_above_one():
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    right = {"accuracy": lambda output, target: (output.argmax(1) == target).double().mean()}
    surface = ss.landscape(model, (X, Y), F.cross_entropy, grid=51, tolerance=0.02, metrics=right)
    accuracy = surface.metrics["accuracy"]
    assert not surface.computed.all() and accuracy[surface.computed].max() == 1.0
    assert accuracy.max() <= 1.0 and accuracy.min() >= 0.0


def test_a_compiled_model_is_on_the_same_plane():
    plain = ss.landscape(_model(), (X, Y), F.cross_entropy, grid=5, strategy="plain")
    compiled: Any = torch.compile(_model(), backend="eager")
    for model in (compiled, nn.DataParallel(_model())):
        again = ss.landscape(model, (X, Y), F.cross_entropy, grid=5, strategy="plain")
        assert np.array_equal(again.values, plain.values) and again.name == plain.name
    pair = ss.paired_landscapes({"a": _model(), "b": compiled}, (X, Y), F.cross_entropy, grid=3)
    assert pair.shared_weights and not np.any(pair.difference)


def test_what_draws_its_own_noise_is_held_against_a_loss_with_the_same_noise():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _model()

        def forward(self, x):
            return self.inner(x + torch.randn_like(x))

    surface = ss.landscape(Noisy(), (X, Y), F.cross_entropy, grid=3)
    assert surface.checks.passed and surface.checks.centre_loss == surface.checks.model_loss


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": []}, "at least one shortcut"),
        ({"directions": [{"0.weight": "up"}]}, "holds something that is no tensor"),
    ],
)
def test_what_cannot_be_used_is_told(options, words):
    with pytest.raises(ss.SkipscopeError, match=words):
        ss.landscape(_model(), (X, Y), F.cross_entropy, grid=3, **options)


def test_metrics_of_an_objective_are_refused_in_words():
    @ss.objective
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ss.SkipscopeError, match="an @objective has none to hand over"):
        ss.landscape(_model(), (X, Y), loss, grid=3, metrics={"m": lambda output, target: output.mean()})


def test_shortcuts_from_a_generator_are_read_more_than_once(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(x + self.a(x).tanh())

    torch.manual_seed(0)
    model = Residual()
    found = ss.find_shortcuts(model, X)
    options: Any = {"grid": 3, "strategy": "plain"}
    listed = ss.landscape(model, (X, Y), F.cross_entropy, strength=found, **options)
    drawn = ss.landscape(
        model, (X, Y), F.cross_entropy, strength=(s for s in found), store=tmp_path / "s", **options
    )
    assert np.array_equal(listed.values, drawn.values)


def test_regularised_scores_have_the_regulariser_in_their_errors():
    strong = ss.landscape(_model(), (X, Y), F.cross_entropy, grid=7, l2=50.0, strategy="plain")
    assert strong.scores.convexity_share == 1.0 and strong.scores.errors["convexity_share"] == 0.0


def test_noise_of_the_models_own_over_several_batches():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _model()

        def forward(self, x):
            return self.inner(x + torch.randn_like(x))

    batches = ss.batches([(X[:25], Y[:25]), (X[25:], Y[25:])])
    surface = ss.landscape(Noisy(), batches, F.cross_entropy, grid=3, batch_norm="recalibrate")
    again = ss.landscape(Noisy(), batches, F.cross_entropy, grid=3)
    assert surface.checks.passed and np.array_equal(surface.values, again.values)


def test_every_seed_of_a_band_sees_the_same_data():
    class Augmenting:
        def __init__(self):
            self.random = np.random.default_rng(0)

        def __iter__(self):
            yield X + torch.from_numpy(self.random.normal(size=(40, 6))).float(), Y

    band = ss.landscape(_model(), Augmenting(), F.cross_entropy, grid=3, seed=[3, 4, 5], samples=20)
    hashes = {surface.provenance.data_hash for surface in band.surfaces.values()}
    assert len(hashes) == 1 and len({surface.scores.centre for surface in band.surfaces.values()}) == 1
    assert all(surface.checks.samples == 20 for surface in band.surfaces.values())


@pytest.mark.parametrize("mode", ["frozen", "recalibrate", "batch"])
def test_an_instance_norm_that_keeps_statistics_follows_the_mode(mode):
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(3, track_running_stats=True, affine=True)
    model = nn.Sequential(nn.Conv1d(2, 3, 1), norm, nn.Flatten(), nn.Linear(12, 2)).double()
    norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
    data = ss.batches([(torch.randn(n, 2, 4).double(), torch.randn(n, 2).double()) for n in (5, 3)])
    found = ss.landscape(model, data, F.mse_loss, grid=(1,), batch_norm=mode, strategy="plain")
    means, variances = [], []
    for x, _ in data:
        h = model[0](x).detach()
        means.append(h.mean(2).mean(0))
        variances.append(h.var(2).mean(0))  # torch keeps the unbiased variance, averaged over the batch
    total = 0.0
    for x, y in data:
        h = model[0](x).detach()
        if mode == "batch":
            centre, spread = h.mean(2, keepdim=True), h.var(2, keepdim=True, unbiased=False)
        elif mode == "recalibrate":
            centre, spread = torch.stack(means).mean(0)[:, None], torch.stack(variances).mean(0)[:, None]
        else:
            centre, spread = norm.running_mean[:, None], norm.running_var[:, None]
        out = model[3](((h - centre) / (spread + norm.eps).sqrt()).flatten(1)).detach()
        total += float((out - y).square().sum())
    assert found.values[0] == pytest.approx(total / 16, rel=1e-12)
