"""Training of twins: a run is a plain loop, bit for bit; seeds are seeds, and a target never reached says so."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import reference
from skipscope._data import read
from skipscope._errors import SkipscopeError
from skipscope.comparison.training import smoothed
from skipscope.comparison.training._network_makers import Maker
from skipscope.comparison.training._optimizers import choices
from skipscope.comparison.training._stream import Stream
from skipscope.comparison.training._train import train_and_keep
from skipscope.comparison.training._training_run import Course, Run, train_each

MAKE = partial(reference.deep_mlp, 3, width=16, inputs=64, shortcut="identity")


def stream_and_loss(model, n=200, size=32):
    batches, loss = read(model, reference.digits(n), F.cross_entropy, "test")
    return Stream(batches, model, loss, size), loss


def tanh_net(width=8, classes=3):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, classes))


def batch(n=96):
    torch.manual_seed(7)
    x = torch.randn(n, 8)
    return x, x[:, :3].argmax(1)


def course(make, data, loss=F.cross_entropy, steps=12, size=32, **options):
    batches, objective = read(make(0), data, loss, "test")
    return Course(Stream(batches, make(0), objective, size), objective, steps, **options)


def plain_loop(make, the_course, optimizer, seed=0, schedule=None, clip=None, autocast=None):
    """What a person would write: seed, make the network and the optimizer, loop."""
    torch.manual_seed(seed)
    model, losses = make(), []
    driver = optimizer(model.parameters())
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(driver, schedule)
    for _, (x, y) in zip(range(the_course.steps), the_course.stream.batches(seed)):
        driver.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        driver.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses, model


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01),
}
RECIPES = {
    "plain": {},
    "schedule": {"schedule": lambda step: 1 / (1 + step)},
    "clip": {"clip": 0.05},
    "autocast": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_has_the_bits_of_a_plain_loop(dtype, optimizer, recipe):
    """Torch's optimizers move all weights as one tensor: that must not show."""
    options, data = RECIPES[recipe], (batch()[0].to(dtype), batch()[1])

    def make():
        return tanh_net(7).to(dtype)

    names = {"schedule": "schedule", "clip": "clip_norm", "autocast": "autocast"}
    the_course = course(Maker(make), data, **{names[k]: v for k, v in options.items()})
    choice = choices("test", {optimizer: (0.1, 0.01)})[optimizer]
    runs = [Run(0, 0.1), Run(1, 0.1), Run(0, 0.01)]
    logs = train_each(Maker(make), runs, choice, the_course, "t")
    for run in runs:
        expected, model = plain_loop(
            make, the_course, lambda p: OPTIMIZERS[optimizer](p, lr=run.rate), run.seed, **options
        )
        assert list(logs[run].losses) == expected
        assert all(map(torch.equal, logs[run].network.parameters(), model.parameters()))


def test_every_twin_is_trained_one_by_one():
    runs = ss.train_twins({"m": tanh_net}, batch(), F.cross_entropy, steps=2, seeds=1, optimizers="SGD")
    assert runs.engine == {"m": "one by one"}


def test_the_size_of_a_step_is_that_of_the_update_over_that_of_the_weights():
    make, data = Maker(lambda: tanh_net().double()), (batch()[0].double(), batch()[1])
    the_course, choice = course(make, data, steps=1), choices("test", {"SGD": 0.1})["SGD"]
    ratio = train_each(make, [Run(0, 0.1)], choice, the_course, "t")[Run(0, 0.1)].update_ratio[0]
    before = nn.utils.parameters_to_vector(make(0).parameters()).detach()
    _, model = plain_loop(make.build, the_course, OPTIMIZERS["SGD"])
    update = (nn.utils.parameters_to_vector(model.parameters()) - before).detach()
    assert ratio == pytest.approx(float(update.norm() / before.norm()), rel=1e-12)


class OnData(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class WithBuffer(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Noisy(nn.Linear):
    """Noise too small to be seen in the loss."""

    def forward(self, x):
        return super().forward(x + 1e-9 * torch.randn_like(x))


class HookOnActivation(nn.Linear):
    """A hook that does nothing to the gradients of a first step."""

    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda gradient: gradient.clamp(-100, 100))
        return y


class HookOnParameter(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight.register_hook(lambda gradient: gradient.clamp(-100, 100))


class Counts(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / (1 + 0.1 * self.calls)


class DrawnConstant(nn.Linear):
    """A tensor outside of the state: another for each seed."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.constant = torch.rand(3)

    def forward(self, x):
        return super().forward(x) * self.constant


class FrozenBias(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.bias.requires_grad_(False)


class GradientOfItsOwn(nn.Linear):
    """The same loss as without, and another gradient: only gradients tell."""

    def forward(self, x):
        class Double(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(y):
                return y.clone()

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def backward(ctx, gradient):
                return 2 * gradient

        return Double.apply(super().forward(x))


AWKWARD = {
    "control flow on data": lambda: OnData(8, 3),
    "buffers": WithBuffer,
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 3)),
    "noise too small to see": lambda: Noisy(8, 3),
    "a hook on an activation": lambda: HookOnActivation(8, 3),
    "a hook on a parameter": lambda: HookOnParameter(8, 3),
    "a counter": lambda: Counts(8, 3),
    "a constant of its own": lambda: DrawnConstant(8, 3),
    "a frozen weight": lambda: FrozenBias(8, 3),
}


@pytest.mark.parametrize("name", [*AWKWARD, "a gradient of its own"])
def test_train_twins_is_a_plain_loop_whatever_the_model_does(name):
    make = {**AWKWARD, "a gradient of its own": lambda: GradientOfItsOwn(8, 3)}[name]
    runs = ss.train_twins(
        {"m": make}, batch(), F.cross_entropy, seeds=2, steps=8, batch_size=32, optimizers={"SGD": 0.1}
    )
    for seed in (0, 1):
        expected, _ = plain_loop(make, course(Maker(make), batch(), steps=8), OPTIMIZERS["SGD"], seed)
        np.testing.assert_allclose(runs.curves["m"]["SGD"].losses[seed], expected, rtol=1e-5)


def test_a_course_stops_at_its_loss():
    make, choice = Maker(tanh_net), choices("test", {"SGD": (0.5, 0.1)})["SGD"]
    runs = [Run(0, 0.5), Run(0, 0.1)]
    logs = train_each(make, runs, choice, course(make, batch(), steps=200, stop_at=0.7), "t")
    lengths = [len(logs[run].losses) for run in runs]
    assert max(lengths) < 200 and (smoothed(logs[runs[0]].losses) <= 0.7).any()


# --- the model as found ---


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.seen = []

    def forward(self, x):
        if torch.is_grad_enabled():  # a step of training, and no measurement
            SEEN.add((self.training, self.norm.training))
        return self.head(self.norm(self.layer(x)))


SEEN: set[tuple[bool, bool]] = set()


@pytest.mark.parametrize(
    "modes, expected, note",
    [
        ((True, True), (True, True), None),
        ((True, False), (True, False), "as they were found"),
        ((False, False), (True, True), "was in evaluation mode"),
    ],
)
def test_modes_are_those_that_were_found(modes, expected, note):
    model = Norms().train(modes[0])
    model.norm.train(modes[1])
    SEEN.clear()
    runs = ss.train_twins({"m": model}, batch(), F.cross_entropy, seeds=1, steps=3, optimizers={"SGD": 0.1})
    assert {expected} == SEEN
    assert (note is None and not runs.notes) or note in str(runs)
    assert (model.training, model.norm.training) == modes


def test_hooks_on_the_parameters_of_a_ready_module_act_and_see_its_copy_only():
    model = tanh_net()
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    losses = (
        ss.train_twins({"m": model}, batch(32), F.cross_entropy, seeds=1, steps=5, optimizers={"SGD": 0.1})
        .curves["m"]["SGD"]
        .losses
    )
    assert losses.std() < 1e-6 and all(p.grad is None for p in model.parameters())


def test_an_optimizer_in_the_backward_pass_of_a_ready_module_is_refused_with_the_cure():
    model = tanh_net()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(SkipscopeError, match="pass a factory"):
        ss.train_twins({"m": model}, batch(), F.cross_entropy, steps=2)


# --- optimizers ---


def cosine(parameters):
    optimizer = torch.optim.RAdam(parameters, lr=0.02)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)


@pytest.mark.parametrize(
    "optimizers, name, rate",
    [
        (torch.optim.SGD, "SGD", 1e-3),
        ({"mine": partial(torch.optim.RMSprop, lr=0.02)}, "mine", 0.02),
        ({"mine": (lambda parameters, rate: torch.optim.NAdam(parameters, lr=rate), [0.5, 0.01])}, "mine", None),
        ({"mine": cosine}, "mine", 0.02),
        ({"L-BFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=2)}, "L-BFGS", 0.1),
        ("AdamW", "AdamW", None),
        (["AdamW"], "AdamW", None),
        ({"AdamW": 0.003}, "AdamW", 0.003),
    ],
)  # fmt: skip
def test_optimizers_come_by_name_class_factory_and_pair(optimizers, name, rate):
    runs = ss.train_twins({"m": tanh_net}, batch(), F.cross_entropy, seeds=1, steps=4, optimizers=optimizers)
    curves = runs.curves["m"][name]
    assert np.isfinite(curves.losses).all() and (rate is None or curves.rate == pytest.approx(rate))


def test_a_factory_with_a_scheduler_is_a_plain_loop():
    the_course = course(Maker(tanh_net), batch(), steps=8)
    torch.manual_seed(0)
    model, expected = tanh_net(), []
    optimizer, scheduler = cosine(model.parameters())
    for _, (x, y) in zip(range(8), the_course.stream.batches(0)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        expected.append(loss.item())
    runs = ss.train_twins(
        {"m": tanh_net}, batch(), F.cross_entropy, seeds=1, steps=8, batch_size=32, optimizers={"c": cosine}
    )
    np.testing.assert_allclose(runs.curves["m"]["c"].losses[0], expected, rtol=1e-5)


# --- rates and seeds ---


@pytest.mark.parametrize("rates", [(1e-2, 1e-3), (3000.0, 1000.0), (1e200, 1e190)])
def test_a_best_rate_at_the_edge_extends_the_grid(rates):
    """A bowl: gradient descent on x^2/2 without momentum is at its bottom in one step at rate 1."""
    from skipscope.comparison.training._sweep import _beyond

    def losses(rate):
        return np.array([1.0, abs(1 - rate) ** 2 if rate < 1e100 else np.nan])

    tried = {rate: losses(rate) for rate in rates}
    while len(tried) < 20 and (beyond := _beyond(tried)):
        tried |= {rate: losses(rate) for rate in beyond}
    best = min(tried, key=lambda rate: np.nan_to_num(tried[rate][1], nan=np.inf))
    assert min(tried) < best < max(tried) or (rates[0] == 1e200 and min(tried) < 1e190)


def test_rates_that_do_not_matter_are_not_extended():
    from skipscope.comparison.training._sweep import _beyond

    assert _beyond({0.1: np.full(9, 2.3), 0.01: np.full(9, 2.3)}) == []
    assert _beyond({0.1: np.array([1.0, 0.2]), 0.03: np.array([1.0, 0.1]), 0.01: np.array([1.0, 0.5])}) == []
    assert _beyond({0.1: np.array([-1.0, -4.0]), 0.03: np.array([-1.0, -3.0])}) == [0.333, 1.11]


def test_a_scaled_loss_finds_its_rate_beyond_the_grid():
    def small(output, target):
        return F.cross_entropy(output, target) / 50

    runs = ss.train_twins({"m": tanh_net}, batch(), small, seeds=1, steps=30, optimizers={"SGD": (0.1, 0.03)})
    curves = runs.curves["m"]["SGD"]
    assert curves.rate > 0.1 and len(curves.sweep) > 2
    assert curves.is_at_edge == ("at the edge of the rates tried" in str(runs).replace("\n", " "))


def test_the_seed_that_chose_the_rate_is_not_reported():
    runs = ss.train_twins(
        {"m": tanh_net}, batch(), F.cross_entropy, seeds=[3, 5], steps=5, optimizers={"SGD": (0.1, 0.01)}
    )
    assert runs.curves["m"]["SGD"].sweep_seed == 6 and runs.seeds == (3, 5)


# --- targets ---


def shifted(by):
    return lambda output, target: F.cross_entropy(output, target) + by


def test_a_loss_below_zero_has_a_target_below_its_first_loss():
    options = {"seeds": 2, "steps": 60, "optimizers": {"SGD": 0.1}}
    runs = {by: ss.train_twins({"m": tanh_net}, batch(), shifted(by), **options) for by in (-5, -500)}
    for by, run in runs.items():
        first, curves = run.curves["m"]["SGD"].losses[:, 0].mean(), run.curves["m"]["SGD"]
        assert run.target < first and all(step is None or step > 1 for step in curves.steps_to_target)
    assert runs[-5].target == pytest.approx((first_and_best(runs[-5])[0] + first_and_best(runs[-5])[1]) / 2)


def first_and_best(runs):
    losses = runs.curves["m"]["SGD"].losses
    return losses[:, 0].mean(), smoothed(losses)[:, -1].min()


@pytest.mark.parametrize("by", [0, -5])
def test_what_does_not_fall_does_not_learn(by):
    runs = ss.train_twins(
        {"m": tanh_net}, batch(), shifted(by), seeds=2, steps=30, batch_size=16, optimizers={"SGD": 1e-9}
    )
    assert not runs.curves["m"]["SGD"].learns and runs.curves["m"]["SGD"].steps_to_target == (None, None)


def test_a_fall_to_below_zero_counts_from_where_it_began():
    x = torch.linspace(-1, 1, 64).unsqueeze(1)

    @ss.objective
    def likelihood(model, batch):
        mean, log_deviation = model(batch[0]).unbind(-1)
        return F.gaussian_nll_loss(mean, batch[1].squeeze(-1), (2 * log_deviation).exp())

    runs = ss.train_twins(
        {"m": lambda: nn.Linear(1, 2)},
        (x, 0.01 * x),
        likelihood,
        seeds=1,
        steps=80,
        optimizers={"Adam": 0.03},
    )
    losses = runs.curves["m"]["Adam"].losses[0]
    assert losses[0] > 0 > losses[-1]
    assert runs.target == pytest.approx((losses[0] + smoothed(losses)[-1]) / 2)


def test_same_seed_same_numbers_and_the_models_given_are_not_trained():
    model = MAKE()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    a, b = (
        ss.train_twins({"m": model}, reference.digits(100), F.cross_entropy, seeds=2, steps=10)
        for _ in range(2)
    )
    np.testing.assert_array_equal(a.curves["m"]["SGD"].losses, b.curves["m"]["SGD"].losses)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert a.varies == "batch order only"
    losses = a.curves["m"]["SGD"].losses
    assert losses[0, 0] != losses[1, 0], "another seed is another order of batches"


def test_a_factory_gives_initialisations():
    runs = ss.train_twins({"m": MAKE}, reference.digits(100), F.cross_entropy, seeds=2, steps=5)
    assert runs.varies == "initialisation and batch order"
    assert runs.curves["m"]["SGD"].losses[0, 0] != runs.curves["m"]["SGD"].losses[1, 0]


def test_a_target_never_reached_prints_more_than_the_steps():
    runs = ss.train_twins({"m": MAKE}, reference.digits(100), F.cross_entropy, seeds=1, steps=5, target=1e-6)
    assert runs.steps_text("m", "Adam") == "> 5"
    assert "> 5" in str(runs)
    assert runs.curves["m"]["Adam"].steps_to_target == (None,)
    assert not runs.curves["m"]["Adam"].learns


def test_steps_to_target_are_those_of_the_smoothed_loss():
    runs = ss.train_twins(
        {"m": MAKE},
        reference.digits(400),
        F.cross_entropy,
        seeds=2,
        steps=120,
        target=1.0,
        optimizers={"Adam": 0.003},
    )
    curves = runs.curves["m"]["Adam"]
    for row, step in zip(smoothed(curves.losses), curves.steps_to_target):
        assert step is not None
        assert row[step - 1] <= 1.0
        assert (row[: step - 1] > 1.0).all()


def test_smoothing_is_the_mean_of_the_last_ten_and_forgets_the_first():
    np.testing.assert_allclose(smoothed(np.full((2, 7), 3.0)), 3.0)
    np.testing.assert_allclose(smoothed(np.array([0.0, 1.0, 1.0, 1.0])), [0, 1 / 2, 2 / 3, 3 / 4])
    losses = np.random.default_rng(0).normal(size=(3, 40))
    expected = [[row[max(0, i - 9) : i + 1].mean() for i in range(40)] for row in losses]
    np.testing.assert_allclose(smoothed(losses), expected)
    with_a_peak = losses[0].copy()
    with_a_peak[0] = 1e9
    np.testing.assert_allclose(smoothed(with_a_peak)[10:], expected[0][10:])
    assert np.isfinite(smoothed(np.array([np.inf] + [1.0] * 12))[-1])


def stream_parts(model, data):
    batches, objective = read(model, data, F.mse_loss, "t")
    return batches, model, objective


def test_the_stream_cuts_one_batch_and_shuffles_many():
    x = torch.arange(10.0).unsqueeze(1)
    model = nn.Linear(1, 1)
    one = Stream(*stream_parts(model, (x, x)), 3)
    batches = one.batches(0)
    epoch = torch.cat([next(batches)[0] for _ in range(3)])
    assert epoch.shape == (9, 1)
    assert len(epoch.unique()) == 9
    many = Stream(*stream_parts(model, ss.batches([(x[i : i + 2], x[i : i + 2]) for i in range(0, 10, 2)])))
    source = many.batches(3)
    assert torch.cat([next(source)[0] for _ in range(5)]).sort(0).values.equal(x)


REFUSED = {
    "no twins": (lambda: ss.train_twins({}, reference.digits(8), F.cross_entropy), "nothing to train"),
    "optimizer": (
        lambda: ss.train_twins({"m": MAKE}, reference.digits(8), F.cross_entropy, optimizers={"LARS": (1,)}), "LARS",
    ),
    "not a model": (lambda: ss.train_twins({"m": lambda: 3}, reference.digits(8), F.cross_entropy), "not a torch.nn.Module"),
    "nan": (
        lambda: ss.train_twins({"m": MAKE}, (torch.full((8, 64), torch.nan), torch.zeros(8).long()), F.cross_entropy, steps=3),
        "not finite",
    ),
}  # fmt: skip

OUT_OF_RANGE = [
    {"seeds": 0}, {"seeds": []}, {"seeds": [0.5]}, {"steps": 0}, {"steps": 1.5}, {"batch_size": 0}, {"target": math.nan},
    {"optimizers": {}}, {"optimizers": {"SGD": []}}, {"optimizers": 3}, {"clip_norm": -1.0}, {"autocast": torch.float32}, {"optimizers": {"SGD": [-0.1]}}, {"optimizers": {"Adam": [math.inf]}},
]  # fmt: skip


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range_are_refused_before_anything_runs(options):
    def make():
        raise AssertionError("it ran")

    with pytest.raises(SkipscopeError) as refusal:
        ss.train_twins({"m": make}, reference.digits(8), F.cross_entropy, **options)
    assert refusal.value.operation == "train_twins" and refusal.value.cure


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_refused(name):
    call, words = REFUSED[name]
    with pytest.raises(SkipscopeError, match=words):
        call()


def test_a_ladders_sweep_stops_when_one_rate_is_there():
    options = {"seeds": 1, "steps": 150, "target": 1.0, "optimizers": {"Adam": (0.01, 0.003)}}
    whole, _ = train_and_keep({"m": MAKE}, reference.digits(400), F.cross_entropy, **options, extend=False)
    short, _ = train_and_keep(
        {"m": MAKE}, reference.digits(400), F.cross_entropy, **options, stop_at_target=True
    )
    first = min(
        int(np.flatnonzero(row <= 1.0)[0]) + 1
        for row in smoothed(np.stack([c.losses[0] for c in whole.curves["m"].values()]))
        if (row <= 1.0).any()
    )
    counts = [c.steps_to_target[0] for c in short.curves["m"].values()]
    assert min(counts) <= first
    assert all(c.losses.shape[1] < 150 for c in short.curves["m"].values())


# --- further instances of "equal to a plain loop" ---


class GradientPenalty(nn.Module):
    """A hook on a hidden activation of one sample in two, which turns its gradient around."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.one(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * torch.tensor([1.0, -0.5] * 4))
        return self.two(hidden)


class FullBackwardHook(nn.Sequential):
    """A module's backward hook that changes the gradient of its input."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self[2].register_full_backward_hook(lambda module, grads_in, grads_out: (0.3 * grads_in[0],))


def weaker(parameter):
    parameter.grad.mul_(0.1)


class PostAccumulate(nn.Sequential):
    """A parameter's gradient changed once it is there."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self[0].weight.register_post_accumulate_grad_hook(weaker)


class SignOfAHook(nn.Sequential):
    """Two hooks on one parameter, in their order."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self[2].bias.register_hook(lambda gradient: gradient + 0.01)
        self[2].bias.register_hook(lambda gradient: 2 * gradient)


class FrozenStatistics(nn.Sequential):
    """A batch norm that its own ``train`` keeps in evaluation mode."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self[1].running_mean.normal_(), self[1].running_var.uniform_(0.5, 2)

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class NormWithoutWeights(nn.Sequential):
    """A batch norm whose weights do not train, but whose statistics follow the data."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self[1].requires_grad_(False)


class NoiseOnWeights(nn.Linear):
    def forward(self, x):
        noise = 0.1 * torch.randn_like(self.weight) if self.training else 0
        return F.linear(x, self.weight + noise, self.bias)


class OneOfTwo(nn.Module):
    """A coin decides at each step which layer is trained."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x):
        return self.layers[int(torch.rand(()) < 0.5)](x)


FURTHER = {
    "a hook on an activation, by sample": GradientPenalty,
    "a backward hook of a module": FullBackwardHook,
    "a hook once the gradient is there": PostAccumulate,
    "two hooks on a parameter": SignOfAHook,
    "a batch norm that stays frozen": FrozenStatistics,
    "a batch norm without trained weights": NormWithoutWeights,
    "noise on weights": lambda: NoiseOnWeights(8, 3),
    "one of two layers by a coin": OneOfTwo,
}
FURTHER_RECIPES = {
    "decay": ({"AdamW": partial(torch.optim.AdamW, weight_decay=0.01)}, 0.05, {}, {}),
    "warmup": (
        {"SGD": partial(torch.optim.SGD, momentum=0.9)}, 0.2,
        {"schedule": lambda step: min(1.0, (step + 1) / 5)}, {"schedule": lambda step: min(1.0, (step + 1) / 5)},
    ),
    "clipped cosine": (
        {"Adam": torch.optim.Adam}, 0.1,
        {"schedule": lambda step: 0.5 * (1 + math.cos(math.pi * step / 8)), "clip_norm": 0.1},
        {"schedule": lambda step: 0.5 * (1 + math.cos(math.pi * step / 8)), "clip": 0.1},
    ),
    "autocast and clip": (
        {"SGD": partial(torch.optim.SGD, momentum=0.9)}, 0.1,
        {"autocast": torch.bfloat16, "clip_norm": 0.3}, {"autocast": torch.bfloat16, "clip": 0.3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_train_twins_is_a_plain_loop_for_further_models(name, optimizer):
    make = FURTHER[name]
    runs = ss.train_twins(
        {"m": make},
        batch(),
        F.cross_entropy,
        seeds=[4, 9],
        steps=8,
        batch_size=32,
        optimizers={optimizer: 0.1},
    )
    for row, seed in enumerate((4, 9)):
        expected, _ = plain_loop(make, course(Maker(make), batch(), steps=8), OPTIMIZERS[optimizer], seed)
        np.testing.assert_allclose(runs.curves["m"][optimizer].losses[row], expected, rtol=1e-5)


@pytest.mark.parametrize("name", FURTHER_RECIPES)
@pytest.mark.parametrize("make", [tanh_net, FrozenStatistics, lambda: NoiseOnWeights(8, 3)])
def test_train_twins_is_a_plain_loop_for_further_recipes(name, make):
    kinds, rate, options, theirs = FURTHER_RECIPES[name]
    (optimizer, kind), *_ = kinds.items()
    runs = ss.train_twins(
        {"m": make}, batch(), F.cross_entropy, seeds=2, steps=8, batch_size=32, optimizers={optimizer: rate}, **options
    )  # fmt: skip
    for seed in (0, 1):
        expected, _ = plain_loop(
            make, course(Maker(make), batch(), steps=8), partial(kind, lr=rate), seed, **theirs
        )
        np.testing.assert_allclose(runs.curves["m"][optimizer].losses[seed], expected, rtol=2e-5)


def groups_with_decay(parameters):
    """Decay on matrices alone, a rate of their own for vectors."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 0.05},
        ],
        lr=0.02,
    )


def two_phases(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3, nesterov=True, momentum=0.8)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    after = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, after], [3])


@pytest.mark.parametrize("factory", [groups_with_decay, two_phases])
def test_factories_with_groups_and_two_schedulers_are_a_plain_loop(factory):
    torch.manual_seed(0)
    model, expected = tanh_net(), []
    made = factory(model.parameters())
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    for _, (x, y) in zip(range(8), course(Maker(tanh_net), batch(), steps=8).stream.batches(0)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        expected.append(loss.item())
    runs = ss.train_twins(
        {"m": tanh_net},
        batch(),
        F.cross_entropy,
        seeds=1,
        steps=8,
        batch_size=32,
        optimizers={"mine": factory},
    )
    np.testing.assert_allclose(runs.curves["m"]["mine"].losses[0], expected, rtol=1e-5)


def test_a_reward_and_a_log_density_below_zero_have_targets_that_are_reached():
    """A loss that is minus a reward, and one that starts at zero and falls."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))

    @ss.objective
    def reward(model, batch):
        return -torch.sigmoid((model(batch[0]) * batch[1]).sum(-1)).mean()

    @ss.objective
    def cosine_similarity(model, batch):
        return -F.cosine_similarity(model(batch[0]), batch[1], dim=-1).mean()

    for loss in (reward, cosine_similarity):
        runs = ss.train_twins(
            {"m": lambda: nn.Linear(4, 4)}, (x, x.flip(1)), loss, seeds=2, steps=80, optimizers={"Adam": 0.03}
        )
        curves = runs.curves["m"]["Adam"]
        first, best = curves.losses[:, 0].mean(), smoothed(curves.losses)[:, -1].min()
        assert runs.target == pytest.approx((first + best) / 2) and curves.learns
        assert all(1 < step < 80 for step in curves.steps_to_target)


@pytest.mark.parametrize("seeds", [[0], [7, 2], 3])
def test_the_seed_of_the_sweep_is_never_one_of_those_reported(seeds):
    runs = ss.train_twins({"m": tanh_net}, batch(), F.cross_entropy, seeds=seeds, steps=3)
    for curves in runs.curves["m"].values():
        assert curves.sweep_seed not in runs.seeds and len(curves.losses) == len(runs.seeds)


def test_a_best_rate_below_the_grid_extends_it_downwards():
    def great(output, target):
        return 300 * F.cross_entropy(output, target)

    runs = ss.train_twins({"m": tanh_net}, batch(), great, seeds=1, steps=30, optimizers={"SGD": (3.0, 1.0)})
    curves = runs.curves["m"]["SGD"]
    assert curves.rate < 1.0 and len(curves.sweep) > 2


def test_trained_networks_are_kept_when_asked_for_and_no_file_holds_them(tmp_path):
    make, data, loss = (
        lambda: ss.reference.deep_mlp(2, 8),
        ss.reference.digits(64),
        nn.functional.cross_entropy,
    )
    options = {"seeds": 1, "steps": 20, "optimizers": {"SGD": [0.1]}, "target": 1.0}
    runs = ss.train_twins({"one": make}, data, loss, keep=True, **options)
    network = runs.networks["one"]["SGD"]
    torch.manual_seed(runs.seeds[0])
    assert not torch.equal(next(network.parameters()), next(make().parameters()))
    assert float(loss(network(data[0]), data[1])) < runs.curves["one"]["SGD"].losses[0, 0]
    assert ss.load(runs.save(tmp_path / "runs.json")).networks == {}
    assert ss.train_twins({"one": make}, data, loss, **options).networks == {}
    assert str(runs.curves["one"]["SGD"]).startswith("Curves(rate=0.1, 1 seed x 20 steps, final_loss=")


@pytest.mark.parametrize(("steps", "level", "is_over"), [
    (10, 0.5, True), (20, 0.5, True), (30, 0.5, True),  # the loss is reached
    (9, 0.5, False), (25, 0.5, False), (31, 0.5, False),  # looked at every tenth step only
    (20, 2.0, False), (50, 2.0, True),  # nothing has come down: over half way of 100
])  # fmt: skip
def test_a_course_is_over_every_tenth_step_where_the_loss_is_reached_or_stuck(steps, level, is_over):
    over = Course(None, None, 100, stop_at=1.0)
    assert over.is_over(np.full((2, steps), level)) == is_over
    assert not Course(None, None, 100).is_over(np.full((2, steps), level))
