"""Planes through solutions and trajectories: where the points lie, and what the plane leaves out."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces import solutions_plane, trajectory_plane


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def _batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(30, 4, generator=generator).double(), torch.randint(3, (30,), generator=generator)


def _loss(model):
    return F.cross_entropy(model(_batch()[0]), _batch()[1]).item()


def test_the_line_between_two_solutions_ends_at_both():
    a, b = _model(0), _model(1)
    surface = ss.landscape(
        a, _batch(), F.cross_entropy, directions=solutions_plane(a, b), grid=(5,), span=((0.0, 1.0),)
    )
    assert surface.values[0] == pytest.approx(_loss(a), rel=1e-12)
    assert surface.values[-1] == pytest.approx(_loss(b), rel=1e-12)
    assert surface.axis_names == ("from solution 1 to 2",)
    assert surface.points.losses == pytest.approx([_loss(b)]) and surface.points.coordinates.tolist() == [
        [1.0]
    ]


def test_the_plane_through_three_solutions_holds_all_three():
    models = [_model(k) for k in range(3)]
    plane = solutions_plane(*models)
    assert plane.distances == pytest.approx([0, 0], abs=1e-7)
    for place, model in zip([(0.0, 0.0), *map(tuple, plane.coordinates)], models):
        at = ss.landscape(
            models[0],
            _batch(),
            F.cross_entropy,
            directions=plane,
            grid=(1, 1),
            span=tuple((c, c) for c in place),
        )
        assert at.values[0, 0] == pytest.approx(_loss(model), rel=1e-10)
    low, high = np.array(plane.span()).T
    assert np.all(low < plane.coordinates.min(0)) and np.all(high > plane.coordinates.max(0))


def test_a_trajectorys_plane_is_its_singular_value_decomposition():
    end, way = _model(0), []
    for k in range(5):
        way.append(copy.deepcopy(end))
        with torch.no_grad():
            for p in way[-1].parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * (5 - k)
    plane = trajectory_plane(end, [m.state_dict() for m in way])
    flat = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()]).numpy()  # noqa: E731
    rows = np.stack([flat(m) - flat(end) for m in way])
    _, sizes, vectors = np.linalg.svd(rows, full_matrices=False)
    assert plane.explained == pytest.approx(sizes[:2] ** 2 / (sizes**2).sum())
    assert np.abs(plane.coordinates) == pytest.approx(np.abs(rows @ vectors[:2].T))
    outside = np.linalg.norm(rows - rows @ vectors[:2].T @ vectors[:2], axis=1) / np.linalg.norm(rows, axis=1)
    assert plane.distances == pytest.approx(outside)
    surface = ss.landscape(end, _batch(), F.cross_entropy, directions=plane, grid=5, span=plane.span())
    assert surface.points.losses == pytest.approx([_loss(m) for m in way])
    assert "distance" in str(surface.points)


def test_a_straight_trajectory_that_is_no_plane_is_refused():
    end = _model(0)
    with pytest.raises(ss.SkipscopeError, match="do not span a plane"):
        trajectory_plane(end, [end, _model(1)])
    with pytest.raises(ss.SkipscopeError, match="not the model's"):
        trajectory_plane(end, [nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ss.SkipscopeError, match="the same"):
        solutions_plane(end, copy.deepcopy(end))
    with pytest.raises(ss.SkipscopeError, match="one or two other"):
        solutions_plane(end)


@pytest.mark.parametrize("aside", [0.0, 1e-12, 1e-10])
def test_three_solutions_on_one_line_span_no_plane_also_where_rounding_moves_them(aside):
    a, b = _model(0), _model(1)
    c, draw = copy.deepcopy(a), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for w, v in zip(c.parameters(), b.parameters()):
            w += 0.3 * (v - w) + aside * torch.randn(w.shape, generator=draw).double()
    with pytest.raises(ss.SkipscopeError, match="do not span a plane"):
        solutions_plane(a, b, c)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def test_shortcut_strength_as_an_axis():
    torch.manual_seed(0)
    model = Residual().double()
    batch = torch.randn(20, 4).double(), torch.randint(4, (20,))
    found = ss.find_shortcuts(model, batch[0])
    surface = ss.landscape(model, batch, F.cross_entropy, strength=found, grid=(5, 3))
    assert surface.alphas.tolist() == [0, 0.25, 0.5, 0.75, 1] and surface.axis_names[0] == "shortcut strength"
    assert surface.values[4, 1] == F.cross_entropy(model(batch[0]), batch[1]).item()
    for strength, row in zip(surface.alphas, surface.values):
        twin = ss.ablate(model, found, strength=float(strength))
        alone = ss.landscape(twin, batch, F.cross_entropy, grid=(3,))
        assert np.allclose(alone.values, row, rtol=1e-12)
    line = ss.landscape(model, batch, F.cross_entropy, strength=found, grid=(5,))
    assert np.allclose(line.values, surface.values[:, 1], rtol=1e-12) and line.checks.passed


def test_a_band_over_directions():
    model, batch = _model(), _batch()
    band = ss.landscape(model, batch, F.cross_entropy, grid=5, seed=[1, 2, 3])
    alone = ss.landscape(model, batch, F.cross_entropy, grid=5, seed=2)
    assert np.array_equal(band.surfaces["2"].values, alone.values)
    stack = np.stack([s.values for s in band.surfaces.values()])
    assert np.array_equal(band.low, stack.min(0)) and np.array_equal(band.median, np.median(stack, 0))
    assert band.scores["width"][1] == pytest.approx(
        np.std([s.scores.width for s in band.surfaces.values()], ddof=1)
    )
    assert "3 seeds" in str(band)


def test_agreement_over_direction_seeds():
    band = ss.paired_landscapes(
        {"a": _model(0), "b": _model(1)}, _batch(), F.cross_entropy, grid=5, seed=[1, 2, 3, 4]
    )
    scores = [[p.scores[name].roughness for name in ("a", "b")] for p in band.pairs.values()]
    higher = np.mean([b > a for a, b in scores])
    assert band.agreement["b"]["roughness"] == pytest.approx(higher)
    assert "seeds" in str(band)


def trajectory(end, count):
    """Checkpoints that walk away from ``end``, mostly along two directions."""
    draw = torch.Generator().manual_seed(0)
    axes = [{n: torch.randn(p.shape, generator=draw) for n, p in end.state_dict().items()} for _ in range(2)]
    for k in range(count):
        yield {
            n: p
            + k / count * axes[0][n]
            + np.sin(k) * axes[1][n]
            + 0.1 * torch.randn(p.shape, generator=draw)
            for n, p in end.state_dict().items()
        }


def test_a_long_trajectory_is_read_in_parts(monkeypatch):
    """What is held at once stays small beside the checkpoints, and the parts change nothing: against NumPy's SVD."""
    from skipscope.surfaces.planes import _plane

    end = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 50), nn.PReLU()).to(
        memory_format=torch.channels_last
    )
    end.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    way = list(trajectory(end, 120))
    whole = trajectory_plane(end, way)
    monkeypatch.setattr(_plane, "_PART", 4000)
    sizes, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda ts: sizes.append(sum(t.numel() for t in ts)) or stack(ts))
    plane = trajectory_plane(end, way)
    monkeypatch.undo()
    names = list(dict(end.named_parameters()))
    flat = lambda state: np.concatenate([state[n].double().flatten().numpy() for n in names])  # noqa: E731
    rows = np.stack([flat(state) for state in way]) - flat(end.state_dict())
    assert len(sizes) > 40 and max(sizes) <= max(4000, 120 * 50) < rows.size / 20
    _, singular, vectors = np.linalg.svd(rows, full_matrices=False)
    for found in (whole, plane):
        assert np.abs(found.coordinates) == pytest.approx(np.abs(rows @ vectors[:2].T), rel=1e-9)
        assert found.explained == pytest.approx(singular[:2] ** 2 / (singular**2).sum(), rel=1e-10)
        for direction, vector in zip(found.directions, vectors):
            assert abs(flat(direction) @ vector) == pytest.approx(1, rel=1e-10)
        assert found.coordinates[0].min() >= 0
        outside = np.linalg.norm(rows - rows @ vectors[:2].T @ vectors[:2], axis=1) / np.linalg.norm(
            rows, axis=1
        )
        assert found.distances == pytest.approx(outside, rel=1e-6)


def test_checkpoints_can_stay_on_the_disk(tmp_path):
    end = _model()
    for k, state in enumerate(trajectory(end, 5)):
        torch.save(state, tmp_path / f"{k}.pt")
    held = [torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in range(5)]
    mapped = [torch.load(tmp_path / f"{k}.pt", weights_only=True, mmap=True) for k in range(5)]
    a, b = (trajectory_plane(end, states) for states in (held, mapped))
    assert np.array_equal(a.coordinates, b.coordinates)
    assert all(torch.equal(x[n], y[n]) for x, y in zip(a.directions, b.directions) for n in x)


def test_checkpoints_that_are_not_finite_are_named():
    end = _model()
    way = list(trajectory(end, 4))
    way[2]["0.weight"][0, 0] = float("nan")
    with pytest.raises(ss.SkipscopeError, match="not finite") as refused:
        trajectory_plane(end, way)
    assert refused.value.got == "checkpoint 2"


@pytest.mark.parametrize("mode", ["frozen", "recalibrate", "batch"])
def test_a_checkpoints_own_loss_is_with_its_own_statistics(mode):
    """A checkpoint has batch-norm statistics of its own: with the end's it has another loss than it had in training."""
    torch.manual_seed(0)
    end = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    x, y = _batch()
    way = []
    for k in range(3):
        way.append(copy.deepcopy(end))
        with torch.no_grad():
            way[-1][0].weight += torch.randn(6, 4, generator=torch.Generator().manual_seed(k)).double()
            way[-1].train()(x + k)  # moves its running statistics
        way[-1].eval()
    plane = trajectory_plane(end.eval(), way)
    options = {"grid": 3, "directions": plane, "batch_norm": mode, "strategy": "plain"}
    surface = ss.landscape(end, (x, y), F.cross_entropy, **options)
    for model, own in zip(way, surface.points.losses):
        batch = copy.deepcopy(model)
        if mode != "frozen":
            batch.train()
            batch[1].momentum = None
            batch[1].reset_running_stats()
        outputs = batch(x)
        if mode == "recalibrate":
            outputs = batch.eval()(x)
        assert own == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-10)
