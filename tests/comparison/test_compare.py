"""The main job: the right twins, every number what its word says, the budget kept, the model as it was."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope._errors import SkipscopeError
from skipscope._numbers import short
from skipscope.comparison._claims import (
    _claim_path,
    _claim_product,
    _compare_surfaces,
    _single_shortcuts,
    _training_numbers,
    arrival_of,
    share,
    summary,
)
from skipscope.comparison._comparison_result import _learns
from skipscope.comparison._evidence import Evidence, Roles, Settings
from skipscope.comparison._lecture import QUICK_RATES, _affordable, build
from skipscope.comparison._stages import Clock
from skipscope.comparison.training import Curves
from skipscope.comparison.training._processes import side_by_side
from skipscope.surfaces import one_thread

WITH = partial(reference.deep_mlp, 4, width=16, shortcut="identity", scale=0.5)
PLAIN = partial(reference.deep_mlp, 4, width=16)
DATA = reference.digits(96)
SMALL = {"grid": 5, "steps": 25, "seeds": 2}


@pytest.fixture(scope="module")
def trained():
    return ss.compare(WITH, DATA, F.cross_entropy, **SMALL)


def test_its_twins_are_named_for_what_they_are(trained):
    assert {t.name: t.meaning for t in trained.twins} == {"with": "as built", "without": "removed"}
    assert set(trained.flow) == {"with", "with, detached", "without"}
    assert set(trained.found) == {"with"}
    assert len(trained.found["with"]) == 3, "the first hidden layer changes the width: no shortcut there"
    assert set(trained.surfaces) == {"trained", "paired"}
    assert trained.surfaces["paired"].difference is not None
    assert trained.surfaces["trained"].difference is None
    assert len(trained.importance["with"]) == 3


def test_its_numbers_are_those_of_each_room_alone(trained):
    torch.manual_seed(0)
    model = WITH().train()
    found = ss.find_shortcuts(model, DATA[0])
    alone = ss.gradient_flow(ss.ablate(model, found), DATA, F.cross_entropy)
    assert [b.gradient_rms for b in trained.flow["without"].boundaries] == [
        b.gradient_rms for b in alone.boundaries
    ]
    np.testing.assert_array_equal(
        trained.paths["with"].norms, ss.path_spectrum(model, DATA, F.cross_entropy).norms
    )
    sweep = trained.strength["with"]
    assert sweep.fall_decades[-1] == pytest.approx(trained.flow["with"].verdict.fall_decades)
    assert sweep.fall_decades[0] == pytest.approx(trained.flow["without"].verdict.fall_decades)


ANSWERS = {"holds", "holds in part", "does not hold here", "not measured"}


def assert_plainly_told(result):
    """A few short sentences on top; each claim with what is true and what does not follow, in at most 25 words each."""
    assert 2 <= len(result.summary) <= 4
    for sentence in result.summary:
        assert len(sentence.split()) <= 25, sentence
    assert sum(c.claim.startswith("Gradients become progressively smaller") for c in result.claims) == 1
    for claim in result.claims:
        assert claim.answer in ANSWERS
        assert len(claim.finding.split()) <= 25, claim.finding
        assert len(claim.limits.split()) <= 25, claim.limits
        assert claim.answer == "not measured" or (claim.limits and claim.see)


def test_what_is_said_is_short_and_has_its_limits(trained):
    assert_plainly_told(trained)
    assert max(map(len, str(trained).splitlines())) <= 200


def test_same_seed_same_numbers(trained):
    again = ss.compare(WITH, DATA, F.cross_entropy, **SMALL)
    a, b = (r.to_dict() for r in (trained, again))
    for result in (a, b):
        result["provenance"].pop("seconds"), result["provenance"].pop("seconds in all")
    a, b = (
        {k: v for k, v in r.items() if k not in {"provenance", "surfaces"}} for r in (a, b)
    )  # a surface's provenance names the strategy that was fastest on the day
    assert ss._result.finite(a) == ss._result.finite(b)
    for kind in ("trained", "paired"):
        for name, surface in trained.surfaces[kind].surfaces.items():
            other = again.surfaces[kind].surfaces[name].values
            np.testing.assert_allclose(surface.values, other, rtol=1e-4)


def test_it_saves_and_loads(trained, tmp_path):
    path = trained.save(tmp_path / "c.json")
    again = ss.load(path)
    assert type(again) is ss.comparison.Comparison
    assert again.summary == trained.summary
    assert str(again) == str(trained)


def test_a_model_without_shortcuts_is_compared_with_one_to_which_they_were_added():
    result = ss.compare(PLAIN, DATA, F.cross_entropy, train=False, grid=3)
    assert {t.name: t.meaning for t in result.twins} == {"without": "as built", "with": "shortcuts added"}
    assert len(result.found["with"]) == 3
    assert "with, removed" in result.flow
    removed, plain = result.flow["with, removed"], result.flow["without"]
    np.testing.assert_allclose(
        removed.boundaries[0].gradient_rms, plain.boundaries[0].gradient_rms, rtol=1e-5
    )  # taking the added shortcuts out again gives the plain network back
    assert result.training is None
    assert any("added" in note for note in result.notes)


def test_a_ready_model_varies_batch_order_only_and_is_left_alone():
    torch.manual_seed(1)
    model = WITH().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    result = ss.compare(model, DATA, F.cross_entropy, **SMALL)
    assert result.training.varies == "batch order only"
    assert not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.slow
def test_kinds_of_shortcut_stand_beside_it_trained_alike():
    """The twin of each kind is `rewire`'s, its curve that of `train_twins`; what does not fit is refused in words."""
    kinds = ["identity", "rezero", "highway", "dense"]
    small = {"steps": 12, "seeds": 1, "grid": 3}
    result = ss.compare(WITH, DATA, F.cross_entropy, variants=kinds, **small)
    assert [t.meaning for t in result.twins] == [
        "as built", "removed", "kind: identity", "kind: rezero", "kind: highway",
    ]  # fmt: skip
    assert sum(note.startswith("dense was left out: ") for note in result.notes) == 1
    assert set(result.surfaces["trained"].surfaces) == {"with", "without"}
    torch.manual_seed(0)
    model = WITH().train()
    found = ss.find_shortcuts(model, DATA[0])

    def rezero():
        return ss.rewire(WITH(), found, kind="rezero", inputs=DATA[0])

    alone = ss.train_twins({"rezero": rezero}, DATA, F.cross_entropy, steps=12, seeds=1)
    assert alone.curves["rezero"]["Adam"].rate == result.training.curves["rezero"]["Adam"].rate
    np.testing.assert_allclose(
        alone.curves["rezero"]["Adam"].losses, result.training.curves["rezero"]["Adam"].losses, rtol=1e-4
    )
    table = result.kinds_table()
    assert [row[0] for row in table.rows] == ["as built", "removed", "identity", "rezero", "highway"]
    assert table.rows[3][2] == pytest.approx(alone.curves["rezero"]["SGD"].final_loss, rel=1e-4)
    assert all(row[-1] == result.flow[twin.name].verdict.state for row, twin in zip(table.rows, result.twins))
    # Shortcuts by the identity are those that the network has.
    np.testing.assert_allclose(
        result.training.curves["identity"]["SGD"].losses,
        result.training.curves["with"]["SGD"].losses,
        rtol=1e-4,
    )


def test_kinds_are_added_where_there_are_no_shortcuts():
    result = ss.compare(PLAIN, DATA, F.cross_entropy, variants=["rezero"], train=False, grid=3)
    assert result.twins[-1].meaning == "kind: rezero"
    assert [row[0] for row in result.kinds_table().rows] == ["as built", "shortcuts added", "rezero"]


@pytest.mark.parametrize(
    ("variants", "words"),
    [(["skip"], "unknown kind"), ([PLAIN], "kinds of shortcut"), (["dense"], "cannot take")],
)
def test_kinds_that_do_not_exist_or_fit_are_refused(variants, words):
    with pytest.raises(SkipscopeError, match=words):
        ss.compare(WITH, DATA, F.cross_entropy, variants=variants, train=False)


def test_variants_stand_beside_it():
    variants = {"scaled": partial(reference.deep_mlp, 4, width=16, shortcut="identity", scale="depth")}
    result = ss.compare(WITH, DATA, F.cross_entropy, variants=variants, train=False, grid=3)
    assert {"with", "without", "scaled"} <= set(result.flow)
    assert "scaled, removed" not in result.flow or "scaled" in result.found


def test_a_budget_is_kept_by_leaving_out_and_saying_so():
    result = ss.compare(WITH, DATA, F.cross_entropy, budget=0.0, grid=3)
    assert result.training is None
    assert any(note.startswith("training was left out") for note in result.notes)
    assert any("surfaces" in note and "left out" in note for note in result.notes)
    assert result.flow, "what is cheap is always measured"


@pytest.mark.parametrize(
    "steps, learns, words",
    [
        ((3, 4), True, "SGD"),
        ((3, None), False, "SGD (1 of 2 seeds)"),
        ((None, None), False, ""),
        ((3, 4), False, "SGD (for a time)"),
    ],
)
def test_learning_on_some_seeds_is_told_apart_from_none(steps, learns, words):
    curves = Curves(0.1, {}, np.ones((2, 5)), np.ones((2, 5)), steps, learns)
    assert _learns("SGD", curves) == words


@pytest.mark.parametrize("quick", [False, True])
def test_few_steps_that_were_asked_for_are_run_and_decide_nothing(quick):
    """Nobody learns in five steps: the page says where each ends, and makes no claim of who is slower."""
    result = ss.compare(WITH, DATA, F.cross_entropy, grid=3, steps=5, seeds=1, quick=quick)
    assert result.training.steps == 5
    (claim,) = (c for c in result.claims if c.key == "stagnate")
    assert claim.answer == "not measured" and "in 5 steps" in claim.finding
    assert_plainly_told(result)
    ends = [short(c.final_loss) for c in (result.training.curves[n]["SGD"] for n in ("with", "without"))]
    assert f"{ends[0]} with shortcuts and {ends[1]} without" in claim.why
    assert result.summary[2].startswith("Neither network reaches a loss of")
    assert [row[-1] for row in result.table().rows] == ["none in 5 steps"] * 2


def test_batch_norm_of_the_removed_twin_is_recalibrated():
    norm = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), ss.nn.IdentityShortcut(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))),
        nn.Linear(8, 10),
    )  # fmt: skip
    result = ss.compare(norm, DATA, F.cross_entropy, train=False, grid=3)
    assert len(result.found["with"]) == 1
    assert np.isfinite(result.surfaces["paired"].difference).all()


REFUSED = {
    "no model": (lambda: ss.compare(None, DATA, F.cross_entropy), "data without a model"),
    "not a model": (lambda: ss.compare(3, DATA, F.cross_entropy), "not a torch.nn.Module"),
    "nan": (lambda: ss.compare(WITH, (DATA[0] * torch.nan, DATA[1]), F.cross_entropy), "not finite"),
    "detached": (lambda: ss.compare(WITH, DATA, lambda o, t: F.cross_entropy(o.detach(), t)), "no gradient"),
    "no steps": (lambda: ss.compare(WITH, DATA, F.cross_entropy, steps=0), "steps is out of range"),
    "no seeds": (lambda: ss.compare(WITH, DATA, F.cross_entropy, seeds=0), "seeds is out of range"),
    "no grid": (lambda: ss.compare(WITH, DATA, F.cross_entropy, grid=2), "grid is out of range"),
    "no time": (lambda: ss.compare(WITH, DATA, F.cross_entropy, budget=-1.0), "budget is out of range"),
    "ambiguous": (lambda: ss.compare(WITH, [DATA, DATA], F.cross_entropy), "ss.batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_refused(name):
    call, words = REFUSED[name]
    with pytest.raises(SkipscopeError, match=words):
        call()


def test_the_lectures_four_networks_share_their_draw():
    networks = build(3, seed=5)
    plain, short, scaled = (networks[n].state_dict() for n in ("plain", "shortcuts", "shortcuts, scaled"))
    assert all(torch.equal(plain[k], short[k]) and torch.equal(plain[k], scaled[k]) for k in plain)
    he = networks["plain, He"].state_dict()
    assert not torch.equal(he["layers.1.0.weight"], plain["layers.1.0.weight"])


def test_a_summary_of_nothing_says_nothing():
    assert summary(Evidence(Roles("with", "without"), {})) == ()


@pytest.mark.slow
def test_the_main_job_whole():
    result = ss.compare()
    assert [r.depth for r in result.depths] == [8, 16, 30]
    assert set(result.training.curves) == {"plain", "plain, He", "shortcuts", "shortcuts, scaled"}
    assert result.flow["plain"].verdict.state == "vanishing"
    assert result.flow["shortcuts"].verdict.fall_decades < -1
    assert result.depths[-1].learns["shortcuts"]["Adam"]
    assert not any(result.depths[-1].learns["plain"].values())
    assert_one_depth(result)


def assert_one_depth(result):
    """What is trained, ranked and drawn is as deep as what the headline names."""
    assert result.depths[-1].depth == 30 and "30 hidden layers" in result.subject
    importance = result.importance["shortcuts"]
    assert [i.name for i in importance] == [s.name for s in result.found["shortcuts"]]
    learns = {
        n: {o: None not in c.steps_to_target for o, c in by.items()}
        for n, by in result.training.curves.items()
    }
    assert result.depths[-1].learns == learns
    assert result.depths[-1].fall == {n: result.flow[n].verdict.fall_decades for n in result.depths[-1].fall}


def test_the_main_job_quick():
    result = ss.compare(quick=True, budget=900, steps=70)
    removed, plain = result.flow["shortcuts, removed"], result.flow["plain"]
    assert [b.gradient_rms for b in removed.boundaries][-1] == pytest.approx(
        plain.boundaries[-1].gradient_rms
    )
    assert result.flow["plain"].verdict.fall_decades > 10
    assert_plainly_told(result)
    assert result.flow["shortcuts"].verdict.fall_decades < -1
    assert not any(result.depths[-1].learns["plain"].values())
    assert result.depths[-1].learns["shortcuts"]["Adam"]
    assert_one_depth(result)


def test_the_users_network_runs_at_most_90_times(monkeypatch):
    runs, forward = [], reference.DeepMLP.forward
    monkeypatch.setattr(reference.DeepMLP, "forward", lambda self, x: runs.append(1) or forward(self, x))
    make = lambda: reference.deep_mlp(6, shortcut="identity")  # noqa: E731
    result = ss.compare(make, reference.digits(64), F.cross_entropy, train=False, grid=3)
    assert len(runs) <= 90
    sweep, flow = result.strength["with"], result.flow
    assert sweep.fall_decades[0] == flow["without"].verdict.fall_decades
    assert sweep.fall_decades[-1] == flow["with"].verdict.fall_decades
    assert np.isfinite(result.surfaces["paired"].difference).all()


def test_work_in_processes_has_the_bits_of_one_process():
    def train(seed):
        torch.manual_seed(seed)
        model, batch = nn.Linear(64, 10), (torch.randn(64, 64), torch.arange(64) % 10)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        return model.weight.detach().numpy()

    found = {}
    for count in (1, 2, 3):
        with one_thread(), side_by_side(train, count) as answering:
            found[count] = dict(answering([3, 1, 2]))
    for count in (2, 3):
        assert all((found[count][i] == found[1][i]).all() for i in range(3))


def test_a_busy_machine_makes_quick_leave_out_and_say_so():
    settings, clock = Settings(steps=100, seeds=1, optimizers=QUICK_RATES), Clock(30.0)
    assert _affordable((8, 30), settings, 1e-5, clock) == ([30, 8], settings) and not clock.notes
    depths, fewer = _affordable((8, 30), settings, 1e-3, clock)
    assert depths == [30] and 20 <= fewer.steps < 100
    assert not clock.fits("the loss surfaces", lambda: 31.0)
    assert [note.partition(" to ")[0].partition(";")[0] for note in clock.notes] == [
        "training at 8 hidden layers was left out",
        "training was cut from 100",
        "left out: the loss surfaces",
    ]
    assert _affordable((8, 30), settings, 1e-1, clock) == ([], settings)
    assert clock.notes[-1].startswith("training was left out: the budget of 30 s has room for")


def test_a_machine_too_busy_to_train_still_gives_a_page_with_the_papers_picture(monkeypatch, tmp_path):
    for stage in ("_lecture", "_stages"):
        monkeypatch.setattr(f"skipscope.comparison.{stage}.seconds_a_step", lambda *_: 1e3)
    result = ss.compare(quick=True, budget=60)
    assert any(note.startswith("training was left out") for note in result.notes)
    training = next(claim for claim in result.claims if claim.key == "stagnate")
    assert training.answer == "not measured" and result.flow["plain"].verdict.state == "vanishing"
    page = result.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert not result.surfaces and "Precomputed, not of your network" in page
    assert len(page.encode()) < 500_000


# --- the claim on surfaces ---


def scored(roughness, convexity, error=0.01, label=""):
    """A surface with given scores, and one standard error for all."""
    errors = {"roughness": error, "convexity_share": error}
    return SimpleNamespace(
        label=label, scores=SimpleNamespace(roughness=roughness, convexity_share=convexity, errors=errors)
    )


@pytest.mark.parametrize(
    "having, lacking, answer, words",
    [
        (scored(0.0, 0.95), scored(0.2, 0.3), "holds", "chaotic without shortcuts and smooth with"),
        (scored(0.0, 1.0), scored(0.003, 0.95, 0.002), "does not hold here", "Neither surface is chaotic"),
        (scored(0.0, 0.95), scored(0.2, 0.3, label="flat"), "not measured", "has not learnt"),
        (scored(0.19, 0.4, 0.1), scored(0.2, 0.3, 0.1), "does not hold here", "alike within their errors"),
        (scored(0.3, 0.2), scored(0.0, 0.9), "does not hold here", "with shortcuts is the chaotic one"),
    ],
)
def test_a_surface_is_chaotic_only_from_a_stated_floor_on(having, lacking, answer, words):
    said, true, limits = _compare_surfaces(having, lacking)
    assert said == answer and words in true and limits


@pytest.mark.parametrize(
    "decades, words",
    [(0.0, "all"), (0.29, "all"), (0.5, "one part in 3.2"), (3.0, "one part in 1,000"), (16.6, "one part in 10^17"), (-1.54, "35 times as much")],
)  # fmt: skip
def test_a_fall_in_words(decades, words):
    assert share(decades) == words


def test_the_table_of_kinds_gives_loss_accuracies_and_steps_under_each_optimizer(trained):
    table, training = trained.kinds_table(), trained.training
    assert table.columns[:3] == ["shortcuts", "weights", "SGD: final loss"]
    assert table.columns[-1] == "gradient at the start"
    heads = len(training.accuracies("with", "SGD")) + 2  # loss, accuracies, steps
    assert len(table.columns) == 3 + heads * len(training.curves["with"])
    for twin, row in zip(trained.twins, table.rows):
        expected = [twin.meaning, twin.parameters]
        for name, curves in training.curves[twin.name].items():
            accuracies = training.accuracies(twin.name, name).values()
            expected += [curves.final_loss, *accuracies, training.steps_text(twin.name, name)]
        assert row == [*expected, trained.flow[twin.name].verdict.state]


def test_steps_and_updates_are_given_with_and_without_shortcuts():
    def curves(update):
        return Curves(0.1, {}, np.ones((2, 5)), np.full((2, 5), update), (3, 3), True)

    steps = {"has": "12", "lacks": "> 40"}
    training = SimpleNamespace(
        target=0.5,
        steps=40,
        curves={"has": {"SGD": curves(0.25)}, "lacks": {"SGD": curves(0.75)}},
        steps_text=lambda name, optimizer: steps[name],
    )
    roles = SimpleNamespace(with_shortcuts="has", without_shortcuts="lacks")
    words = _training_numbers(SimpleNamespace(training=training, roles=roles, flow={}), ["SGD"])
    assert "SGD: 12 with shortcuts, > 40 without." in words
    assert "A step moves the weights by 0.250 of their size with, 0.750 without." in words


ROLES = SimpleNamespace(with_shortcuts="has", without_shortcuts="lacks")


def flow_of_factors(*factors):
    boundaries = [SimpleNamespace(factor=factor) for factor in (*factors, None)]
    return SimpleNamespace(boundaries=boundaries, product=float(np.prod(factors)))


@pytest.mark.parametrize(("factors", "answer"), [
    ((0.5, 0.5, 0.5), "holds"), ((0.9, 0.9), "holds in part"), ((2.0, 0.9), "does not hold here"),
    ((), "not measured"), ((0.5, math.inf), "not measured"),
])  # fmt: skip
def test_the_claim_of_a_product(factors, answer):
    flow = {"lacks": flow_of_factors(*factors), "has": flow_of_factors(0.5, 1.5)}
    claim = _claim_product(SimpleNamespace(flow=flow, roles=ROLES))
    assert claim.answer == answer
    if answer == "holds":
        assert "3 factors; 100% of them are below 1; their product is 0.125" in claim.why
        assert "the mean factor is 0.866 and the product 0.750" in claim.why  # sqrt(0.75)
        assert "by 0.500 on average, 3 times over" in claim.finding


def test_the_claim_of_an_alternative_path():
    split = [SimpleNamespace(share=share) for share in (0.25, 0.75, None, 0.5)]
    paths = SimpleNamespace(shares=np.array([0.125, 0.875]), mean_length=1.5, branches=3, residual=1e-16)
    claim = _claim_path(SimpleNamespace(split={"has": split}, paths={"has": paths}, roles=ROLES))
    assert claim.answer == "holds" and "50 % of the gradient comes back" in claim.finding
    assert "Over 3 forks the shortcut's share is 25 to 75 %" in claim.why
    assert "the mean path passes 1.50 of 3 branches" in claim.why
    assert "every branch carries 1" in claim.limits


@pytest.mark.parametrize(("flows", "words"), [
    ((0.5, -1.0, 0.25), "any of them alone costs a factor of 3.2 at most"),  # 10^0.5
    ((-1.0, -0.5, -0.25), "any of them alone costs a factor of 1.0 at most"),
    ((3.0, -1.0, 0.25), "taking out one alone costs a factor of 1,000"),
    ((None, None, None), "No single one decides it"),
])  # fmt: skip
def test_what_one_shortcut_alone_does(flows, words):
    ranked = [
        SimpleNamespace(name=name, removed=SimpleNamespace(flow_cost=flow, loss_cost=loss), lesioned=lesion)
        for name, flow, loss, lesion in zip(
            "abc", flows, (4.0, 2.0, 1.0), (SimpleNamespace(loss_cost=0.5), None, None)
        )
    ]
    ranking = SimpleNamespace(ranked=ranked)
    limits, why = _single_shortcuts(SimpleNamespace(importance={"has": ranking}, roles=ROLES))
    assert words in limits
    assert (
        "changes by 4.00 at a and by 1.00 at c (median 2.00). Taking out one branch alone costs 0.500" in why
    )


@pytest.mark.parametrize(("decades", "words"), [
    (3.0, "one part in 1,000 of the gradient reaches the first layer"),
    (-1.0, "the gradient reaches the first layer 10 times larger"),
    (0.0, "the gradient reaches the first layer at full size"),
])  # fmt: skip
def test_what_arrives_in_words(decades, words):
    assert arrival_of(decades) == words


def test_a_network_that_draws_leaves_the_random_state_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    data = torch.randn(8, 4), torch.arange(8) % 3
    before = torch.get_rng_state()
    ss.compare(model, data, nn.functional.cross_entropy, train=False, grid=3)
    assert torch.equal(before, torch.get_rng_state())
