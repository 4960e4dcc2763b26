"""What every surface promises: the model untouched, the seed respected, nothing hidden; and twins side by side."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope._data import Batches, Objective
from skipscope.surfaces import Surface, random_direction
from skipscope.surfaces.evaluation._permutation_test import own_loss


class Residual(nn.Module):
    def __init__(self, width=6, depth=3, shortcut=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.shortcut = shortcut

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() + (x if self.shortcut else 0)
        return x


def _batch(n=30, width=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=generator), torch.randint(width, (n,), generator=generator)


def test_values_are_indexed_alpha_then_beta():
    model = nn.Linear(2, 1, bias=False)
    d, e = ({"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 1.0]])})

    @ss.objective
    def loss(model, batch):
        return (model.weight[0, 0] - 10 * model.weight[0, 1]).reshape(())

    surface = ss.landscape(model, torch.zeros(1), loss, grid=(3, 5), directions=[d, e], span=(1.0, 2.0))
    w = model.weight.detach().numpy()[0]
    expected = (w[0] + surface.alphas)[:, None] - 10 * (w[1] + surface.betas)[None, :]
    assert surface.values.shape == (3, 5) and np.allclose(surface.values, expected, atol=1e-5)
    assert surface.stderr is None and "one number a batch" in surface.why_no_stderr


def test_same_seed_same_bits_and_the_users_random_state_is_left_alone():
    model, batch = Residual(), _batch()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    one, two, other = (ss.landscape(model, batch, F.cross_entropy, grid=5, seed=s) for s in (7, 7, 8))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert np.array_equal(one.values, two.values) and not np.array_equal(one.values, other.values)


def test_the_model_is_left_as_found_also_after_an_error():
    model, batch = Residual().train(), _batch()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    before = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    ss.landscape(model, batch, F.cross_entropy, grid=3)
    calls = []

    def stops(output, target):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        ss.landscape(model, batch, stops, grid=3)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is g for p, g in zip(model.parameters(), before[1]))
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())


def test_the_centre_is_the_models_loss_bit_for_bit():
    torch.manual_seed(0)
    model, batch = reference.resnet20().train(), reference.digits(16)
    surface = ss.landscape(model, batch, F.cross_entropy, grid=3)
    own = F.cross_entropy(model.eval()(batch[0]), batch[1]).item()
    assert surface.values[1, 1] == own == surface.checks.centre_loss and surface.checks.passed


def test_nan_stays_nan_and_inf_stays_inf():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def loss(output, target):
        w = output.mean()
        return torch.where(
            w > 1.25, torch.tensor(float("inf")), torch.where(w < 0.75, torch.tensor(float("nan")), w)
        )

    surface = ss.landscape(
        model,
        (torch.ones(2, 1), torch.ones(2, 1)),
        loss,
        grid=(5,),
        directions=[{"weight": torch.ones(1, 1)}],
    )
    assert np.array_equal(surface.values, [np.nan, np.nan, 1, np.inf, np.inf], equal_nan=True)
    assert surface.computed.all() and surface.checks.nonfinite == 4


def test_a_line():
    surface = ss.landscape(Residual(), _batch(), F.cross_entropy, grid=(9,))
    assert surface.values.shape == (9,) and surface.betas.size == 0 and "9" in str(surface)


def test_twins_that_share_weights_have_a_pointwise_difference_with_its_interval():
    with_shortcut, batch = Residual(), _batch(200)
    without = copy.deepcopy(with_shortcut)
    without.shortcut = False
    pair = ss.paired_landscapes({"with": with_shortcut, "without": without}, batch, F.cross_entropy, grid=5)
    alone = [ss.landscape(m, batch, F.cross_entropy, grid=5) for m in (with_shortcut, without)]
    assert pair.shared_weights
    assert np.array_equal(pair.difference, alone[1].values - alone[0].values)
    low, high = pair.interval
    assert np.all(low <= pair.difference) and np.all(pair.difference <= high)
    # The oracle: the spread of per-sample differences at one point.
    directions = [random_direction(with_shortcut, seed=0, axis=k) for k in (0, 1)]
    losses = []
    for model in (with_shortcut, without):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                for d in directions:
                    p += d.get(name, 0) * -1.0
            losses.append(F.cross_entropy(moved(batch[0]), batch[1], reduction="none").double())
    error = (losses[1] - losses[0]).std().item() / 200**0.5
    assert pair.differences["without"].stderr[0, 0] == pytest.approx(error, rel=1e-4)


def test_twins_trained_apart_share_the_draw_but_no_difference():
    one, other, batch = Residual(), Residual(), _batch()
    pair = ss.paired_landscapes({"one": one, "other": other}, batch, F.cross_entropy, grid=5)
    assert not pair.shared_weights and pair.difference is None and pair.interval is None
    assert set(pair.scores) == {"one", "other"} and "Only the scores" in str(pair)
    d, e = random_direction(one), random_direction(other)
    for name in d:  # the same Gaussian draw: rows are parallel, lengths are each twin's own
        assert torch.allclose(F.cosine_similarity(d[name], e[name], dim=1), torch.ones(6), atol=1e-5)
        assert torch.allclose(
            e[name].norm(dim=1), dict(other.named_parameters())[name].norm(dim=1), rtol=1e-5
        )


def test_a_network_that_has_not_learnt_is_labelled():
    torch.manual_seed(0)
    batch = reference.digits(200)
    sheet = ss.landscape(reference.deep_mlp(depth=30, shortcut=None), batch, F.cross_entropy, grid=7)
    assert sheet.label == "flat: this network has not learnt" and sheet.scores.label == sheet.label
    model = reference.deep_mlp(depth=6, shortcut="identity")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    learnt = ss.landscape(model, batch, F.cross_entropy, grid=7)
    assert learnt.label == "" and learnt.scores.width > 0


def _separable(sharpness, each=2):
    """A linear classifier whose margin grows with ``sharpness``, and so many samples of each class."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(sharpness * torch.eye(4))
    return model, (torch.eye(4).repeat(each, 1), torch.arange(4).repeat(each))


@pytest.mark.parametrize(("sharpness", "has_learnt"), [(8.0, True), (0.0, False), (-8.0, False)])
def test_the_targets_say_whether_a_network_has_learnt(sharpness, has_learnt):
    model, (x, y) = _separable(sharpness)
    loss = Objective("ce", lambda m, b: F.cross_entropy(m(b[0]), b[1]), lambda b: len(b[1]), from_output=lambda o, b: F.cross_entropy(o, b[1]))  # fmt: skip
    exact = F.cross_entropy(model(x), y).item()
    assert own_loss(model, Batches([(x, y)], single=True), loss) == (pytest.approx(exact), has_learnt)
    nothing = own_loss(model, Batches([(x[:1], y[:1])], single=True), loss)
    assert nothing == (pytest.approx(F.cross_entropy(model(x[:1]), y[:1]).item()), None)
    in_pieces = Batches([(x[:6], y[:6]), (x[6:], y[6:])])
    assert own_loss(model, in_pieces, loss)[0] == pytest.approx(exact)


def test_a_batch_that_only_keeps_ranks_in_step_counts_for_nothing():
    class InStep(Batches):
        def turns(self):
            yield from ((batch, True) for batch in self)
            yield (x[:4], (y[:4] + 1) % 4), False

    model, (x, y) = _separable(8.0)
    loss = Objective("ce", lambda m, b: F.cross_entropy(m(b[0]), b[1]), lambda b: len(b[1]), from_output=lambda o, b: F.cross_entropy(o, b[1]))  # fmt: skip
    pieces = [(x[:6], y[:6]), (x[6:], y[6:])]
    assert own_loss(model, InStep(pieces), loss) == own_loss(model, Batches(pieces), loss)


def test_a_narrow_span_is_not_taken_for_a_network_that_has_not_learnt():
    model, batch = _separable(8.0, each=25)
    narrow = ss.landscape(model, batch, F.cross_entropy, grid=5, span=1e-4, strategy="plain")
    assert narrow.label == "flat over this span: widen it"


def test_results_print_save_and_load(tmp_path):
    pair = ss.paired_landscapes({"a": Residual(), "b": Residual()}, _batch(), F.cross_entropy, grid=3)
    loaded = ss.load(pair.save(tmp_path / "pair.json"))
    assert np.array_equal(loaded.surfaces["a"].values, pair.surfaces["a"].values)
    surface = ss.load(pair.surfaces["a"].save(tmp_path / "surface.json"))
    assert isinstance(surface, Surface) and surface.computed.dtype == bool
    for result in (pair, surface, surface.checks, surface.provenance, surface.scores):
        assert max(len(line) for line in result.table().text(80).splitlines()) <= 80


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": 0}, "this is not a grid"),
        ({"grid": (3, 3, 3)}, "this is not a grid"),
        ({"span": (1.0, 2.0, 3.0)}, "this is not a span"),
        ({"span": float("nan")}, "this is not a span"),
        ({"normalize": "channel"}, "unknown normalisation"),
        ({"zero": ("bias",)}, "unknown kind of parameter"),
        ({"batch_norm": "train"}, "unknown batch-norm mode"),
        ({"samples": 0}, "samples= cannot be used"),
        ({"directions": [{"nowhere": torch.ones(1)}]}, "names a parameter that the model does not have"),
        ({"directions": [{"layers.0.weight": torch.ones(1)}]}, "does not have its parameter's shape"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, words):
    with pytest.raises(ss.SkipscopeError, match=words):
        ss.landscape(Residual(), _batch(), F.cross_entropy, **{"grid": 3, **options})


def test_no_twins_is_refused():
    with pytest.raises(ss.SkipscopeError, match="no twins"):
        ss.paired_landscapes({}, _batch(), F.cross_entropy)


def test_a_removed_twins_stale_batch_norm_statistics_are_measured_anew_and_said_so():
    torch.manual_seed(0)
    model, batch = reference.resnet20(), reference.digits(64)
    with torch.no_grad():
        model(batch[0])
    found = ss.find_shortcuts(model, batch[0])
    twins = {"with": model, "removed": ss.ablate(model, found), "detached": ss.ablate(model, found, "detach")}
    pair = ss.paired_landscapes(twins, batch, F.cross_entropy, grid=3)
    expected = ss.recalibrate(ss.ablate(model, found), batch).eval()
    own = F.cross_entropy(expected(batch[0]), batch[1]).item()
    removed = pair.surfaces["removed"]
    assert removed.values[1, 1] == pytest.approx(own, rel=1e-6) and removed.checks.passed
    assert "recalibration" in removed.provenance.batch_norm and "recalibration" in str(pair).replace(
        "\n", " "
    )
    assert np.array_equal(pair.surfaces["detached"].values, pair.surfaces["with"].values)
    assert pair.shared_weights and np.all(pair.differences["detached"].values == 0)
    as_found = ss.paired_landscapes(twins, batch, F.cross_entropy, grid=3, batch_norm="as found")
    stale = F.cross_entropy(twins["removed"].eval()(batch[0]), batch[1]).item()
    assert as_found.surfaces["removed"].values[1, 1] == stale != own


def test_twins_of_other_architectures_each_find_their_way():
    model, other = (
        Residual(),
        nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 6, (2, 3)), nn.Flatten()),
    )
    pair = ss.paired_landscapes(
        {"one": model, "other": other}, _batch(), F.cross_entropy, grid=3, strategy="oneDNN"
    )
    assert "oneDNN" in pair.surfaces["one"].provenance.strategy
    assert pair.surfaces["other"].provenance.strategy == "plain" and not pair.shared_weights


@pytest.mark.parametrize(
    "option",
    [
        {"grid": 2.5}, {"grid": None}, {"grid": "51"}, {"grid": (3, 3, 3)}, {"span": None}, {"seed": "a"}, {"seed": []},
        {"seed": [1, 1]}, {"seed": None}, {"directions": 5}, {"directions": []}, {"metrics": 3}, {"metrics": {"a": 1}},
        {"metrics": {"a": lambda out, y: "much"}}, {"samples": 2.5}, {"samples": 0}, {"l2": float("nan")},
        {"tolerance": "a"}, {"tolerance": -1}, {"store": 3}, {"strength": True}, {"weight": 3}, {"sample_loss": 3},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_options_that_cannot_be_used_are_refused_with_what_can(option):
    data = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(ss.SkipscopeError) as refused:
        ss.landscape(nn.Linear(4, 3), data, F.cross_entropy, **{"grid": 3, **option})
    assert refused.value.expected


@pytest.mark.parametrize("seeds", [range(1, 3), np.array([1, 2]), (1, np.int64(2))], ids=str)
def test_seeds_are_seeds_whatever_holds_them(seeds, tmp_path):
    data = torch.randn(6, 4), torch.randint(3, (6,))
    band = ss.landscape(nn.Linear(4, 3), data, F.cross_entropy, grid=3, seed=seeds, store=tmp_path / "s")
    assert list(band.surfaces) == ["1", "2"]


@pytest.mark.parametrize("call", [ss.paired_landscapes, ss.curvature_map])
def test_own_directions_lead_elsewhere_for_a_twin_with_other_weights(call):
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    options = {"grid": 3, "directions": [random_direction(one), random_direction(one, axis=1)]}
    data = torch.randn(6, 4), torch.randint(3, (6,))
    call({"a": one, "same": copy.deepcopy(one)}, data, F.cross_entropy, **options)
    with pytest.raises(ss.SkipscopeError, match="other weights than the first"):
        call({"a": one, "b": other}, data, F.cross_entropy, **options)


def _about_weights(twins):
    """Whether the notes say that twins were moved alike, and which were moved apart."""
    notes = ss.paired_landscapes(twins, _batch(), F.cross_entropy, grid=3, strategy="plain").notes
    apart = [note.partition(":")[0] for note in notes if "other weights than" in note]
    return any("identical directions" in note for note in notes), apart


def test_the_notes_say_which_twins_were_moved_alike():
    torch.manual_seed(0)
    one, other = Residual(), Residual()
    same = Residual(shortcut=False)
    same.load_state_dict(one.state_dict())
    assert _about_weights({"a": one}) == (False, [])
    assert _about_weights({"a": one, "b": same}) == (True, [])
    assert _about_weights({"a": one, "c": other}) == (False, ["c"])
    assert _about_weights({"a": one, "b": same, "c": other}) == (True, ["c"])
    assert _about_weights({"a": one, "c": other, "d": Residual()}) == (False, ["c, d"])


def test_one_sample_has_no_standard_error():
    x, y = _batch(1)
    surface = ss.landscape(Residual(), (x, y), F.cross_entropy, grid=3, strategy="plain")
    assert surface.stderr is None and surface.why_no_stderr and np.isfinite(surface.values).all()


def test_a_centre_is_not_the_model_where_only_the_model_s_own_loss_is_no_number():
    asked = []

    @ss.objective
    def loss(model, batch):
        asked.append(1)
        value = F.cross_entropy(model(batch[0]), batch[1])
        return value if len(asked) == 1 else value * float("nan")

    surface = ss.landscape(Residual(), _batch(), loss, grid=3, strategy="plain")
    assert np.isnan(surface.checks.model_loss) and np.isfinite(surface.checks.centre_loss)
    assert not surface.checks.centre_is_model
