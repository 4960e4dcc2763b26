"""Every way of evaluating points gives the plain loop's numbers, or is not taken."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.surfaces.evaluation import _autotune, _onednn_linears


def _close(one, other, tolerance=1e-9):
    assert np.allclose(one.values, other.values, rtol=tolerance)
    if other.stderr is not None:
        assert np.allclose(one.stderr, other.stderr, rtol=1e-6, atol=1e-12)
        assert np.allclose(one.centre_stderr, other.centre_stderr, rtol=1e-6, atol=1e-9)


def _convolutional(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, **options), nn.GELU(), nn.Flatten(), nn.Linear(64, 4)).double()


@pytest.mark.parametrize("case", ["one batch", "mixed", "ignore"])
def test_smaller_batches_in_channels_last_equal_the_plain_loop(case):
    model = _convolutional()
    x, y = torch.randn(150, 1, 6, 6).double(), torch.randint(4, (150,))
    if case == "ignore":
        y[::3] = -100
    data = (x, y) if case != "mixed" else ss.batches([(x[:70], y[:70]), (x[70:], y[70:])])
    plain, other = (
        ss.landscape(model, data, F.cross_entropy, grid=5, strategy=s)
        for s in ("plain", "channels last, batches of 64")
    )
    assert other.provenance.strategy != plain.provenance.strategy, other.provenance.why
    _close(other, plain)
    assert other.checks.passed and 0 <= other.checks.strategy_error < 1e-9


LOSSES = {
    "mean": F.cross_entropy,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 3.0, 0.0]), label_smoothing=0.1),
    "ignore": nn.CrossEntropyLoss(ignore_index=2),
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["mlp", "attention"])
def test_one_dnn_runs_the_linear_layers_in_the_same_precision(case, loss):
    torch.manual_seed(0)
    if case == "mlp":
        model = nn.Sequential(
            nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 4)
        )
        x = torch.randn(100, 6)
    else:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 4))
        x = torch.randn(100, 5, 8)
    data = ss.batches([(x[:60], torch.randint(4, (60,))), (x[60:], torch.randint(4, (40,)))])
    plain, other = (ss.landscape(model, data, LOSSES[loss], grid=5, strategy=s) for s in ("plain", "oneDNN"))
    assert other.provenance.strategy == "oneDNN" and "forward" not in model[-1].__dict__
    assert np.allclose(other.values, plain.values, rtol=2e-6)
    assert np.allclose(other.stderr, plain.stderr, rtol=1e-4)
    assert other.checks.passed and other.checks.centre_loss == plain.checks.centre_loss


class _OneForAll(nn.Module):
    """One activation module after two layers, as Hugging Face's and timm's blocks have it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x):
        return self.out(self.act(self.two(self.act(self.one(x)))))


class _NotAlone(_OneForAll):
    """The activation is given something else as well."""

    def forward(self, x):
        h = self.act(self.one(x))
        return self.out(self.act(self.two(h)) + self.act(h * 2))


class _ReadTwice(_OneForAll):
    """What the layer gives is read beside its activation."""

    def forward(self, x):
        h = self.one(x)
        return self.out(self.act(h) + h)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU])
def test_activations_are_computed_on_the_way(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), activation(), nn.Linear(32, 4))
    data = torch.randn(100, 6) * 3, torch.randint(4, (100,))
    plain, other = (
        ss.landscape(model, data, F.cross_entropy, grid=5, strategy=s) for s in ("plain", "oneDNN")
    )
    assert other.provenance.strategy == "oneDNN"
    assert np.allclose(other.values, plain.values, rtol=3e-6)
    run = nn.Sequential(nn.Linear(6, 32), activation(), nn.Linear(32, 4))
    with torch.no_grad():
        expected = run(data[0])
        _onednn_linears.through_one_dnn(run, lambda: run(data[0]))
        assert run[1](data[0]) is data[0], "the layer before it has done it"
        assert torch.allclose(run(data[0]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, fused", [(_OneForAll, True), (_NotAlone, False)])
def test_an_activation_is_left_to_itself_unless_it_follows_layers_only(kind, fused):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(20, 6)
    with torch.no_grad():
        expected = model(x)
        _onednn_linears.through_one_dnn(model, lambda: model(x))
        assert ("forward" in model.act.__dict__) == fused
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_read_twice_is_found_out_by_its_numbers():
    torch.manual_seed(0)
    model, data = _ReadTwice(), (torch.randn(100, 6), torch.randint(4, (100,)))
    plain, other = (
        ss.landscape(model, data, F.cross_entropy, grid=5, strategy=s) for s in ("plain", "oneDNN")
    )
    assert (
        np.array_equal(plain.values, other.values) and "differs from the plain loop" in other.provenance.why
    )


def test_one_dnn_is_no_way_in_another_precision():
    for model, options in ((nn.Linear(6, 4).double(), {}), (nn.Linear(6, 4), {"precision": "bf16"})):
        data = torch.randn(50, 6, dtype=model.weight.dtype), torch.randint(4, (50,))
        with pytest.raises(ss.SkipscopeError, match="unknown strategy"):
            ss.landscape(model, data, F.cross_entropy, grid=3, strategy="oneDNN", **options)


def test_channels_last_on_a_convolutional_network():
    strategy = "channels last, batches of 64"
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.Flatten(), nn.LazyLinear(10)
    )  # fmt: skip
    data = torch.randn(70, 1, 8, 8).double(), torch.randint(10, (70,))
    model.double()(data[0])
    plain, other = (
        ss.landscape(model, data, F.cross_entropy, grid=3, strategy=s) for s in ("plain", strategy)
    )
    assert "channels last" in other.provenance.strategy
    _close(other, plain)


def test_a_loss_that_is_no_mean_over_samples_is_never_split():
    """Splitting this batch changes its loss; the reference says so, and the strategy is dropped with the reason."""
    model, data = _convolutional(), (torch.randn(100, 1, 6, 6).double(), torch.randn(100, 4).double())
    loss = lambda output, target: (output - target).square().mean().sqrt()  # noqa: E731
    plain, other = (
        ss.landscape(model, data, loss, grid=5, strategy=s) for s in ("plain", "channels last, batches of 64")
    )
    assert np.array_equal(plain.values, other.values)
    assert "differs from the plain loop" in other.provenance.why


def test_a_model_whose_samples_mix_is_never_split():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _convolutional()

        def forward(self, x):
            h = self.inner(x)
            return h - h.mean(0)

    model, data = Mixes(), (torch.randn(100, 1, 6, 6).double(), torch.randint(4, (100,)))
    plain, other = (
        ss.landscape(model, data, F.cross_entropy, grid=5, strategy=s)
        for s in ("plain", "channels last, batches of 64")
    )
    assert np.array_equal(plain.values, other.values)


def test_what_draws_random_numbers_draws_the_same_at_every_point():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x):
            return self.inner(x) + torch.randn(len(x), 4)

    data = torch.randn(10, 6), torch.randint(4, (10,))
    model = Noisy()
    one = ss.landscape(model, data, F.cross_entropy, grid=(5, 5))
    other = ss.landscape(model, data, F.cross_entropy, grid=(3, 3), strategy="auto")
    assert np.array_equal(one.values[::2, ::2], other.values)


@pytest.fixture
def no_knowledge(monkeypatch):
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_SHARE", 1e9)


def test_the_choice_is_timed_told_and_kept(no_knowledge):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    data = torch.randn(100, 6), torch.randint(4, (100,))
    one = ss.landscape(model, data, F.cross_entropy, grid=9)
    assert "plain" in one.provenance.why and "oneDNN" in one.provenance.why and " ms" in one.provenance.why
    two = ss.landscape(model, data, F.cross_entropy, grid=9)
    assert two.provenance.strategy == one.provenance.strategy and np.array_equal(one.values, two.values)


def _passes(model, data, grid, **options):
    """Samples that the model and its copies were run on in this process, in passes over the data."""
    counted = [0]
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda m, args: counted.__setitem__(0, counted[0] + len(args[0])) if type(m) is type(model) else None
    )
    try:
        surface = ss.landscape(model, data, F.cross_entropy, grid=grid, **options)
    finally:
        hook.remove()
    return counted[0] / len(data[0]), surface


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = _convolutional().float()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("grid", [3, 7])
def test_no_evaluation_is_lost_on_the_plain_loop(grid):
    """The origin once by a copy and once by the model itself; every other point once."""
    data = torch.randn(100, 1, 6, 6), torch.randint(4, (100,))
    passes, surface = _passes(_Net(), data, grid, strategy="plain")
    assert passes == grid**2 + 1 and surface.complete


@pytest.mark.parametrize("short", [0.2, 0.0], ids=["timed at a point", "compared at the origin"])
def test_what_a_chosen_strategy_was_timed_on_is_kept(short, monkeypatch, no_knowledge):
    """The clock is ours: the candidate is clearly faster, so it is run on one point only before it is chosen."""
    real = _autotune._timed
    monkeypatch.setattr(_autotune, "_SHORT_S", short)
    if not short:
        monkeypatch.setattr(_autotune, "_SHARE", 1e9)  # the origin's real time is short
        monkeypatch.setattr(_autotune._Autotune, "_worth", lambda self, spec: True)
    monkeypatch.setattr(
        _autotune, "_timed", lambda s, points: (0.5 if "channels" in s.name else 2.0, real(s, points)[1])
    )
    if not short:
        monkeypatch.setattr(_autotune, "_timed", lambda s, points: (1e-9, real(s, points)[1]))
    monkeypatch.setattr(_autotune, "CAN_FORK", False)
    data = torch.randn(100, 1, 6, 6), torch.randint(4, (100,))
    passes, surface = _passes(_Net(), data, 7)
    assert surface.provenance.strategy == "channels last, batches of 64"
    assert passes == 49 + 1 + 1  # the point where the two were compared was computed by both


def test_a_dear_candidate_does_not_shut_out_the_others(monkeypatch, no_knowledge):
    real = _autotune.candidate_strategies
    made = []

    def dear(evaluator):
        plain, *others = real(evaluator)
        yield plain
        yield _autotune.StrategySpec("dear", lambda: made.append(1), gain=2.0, seconds=1e6)
        yield from others

    monkeypatch.setattr(_autotune, "candidate_strategies", dear)
    data = torch.randn(100, 1, 6, 6), torch.randint(4, (100,))
    _, surface = _passes(_Net(), data, 9)
    assert "channels last" in surface.provenance.why and not made


def test_a_larger_grid_goes_on_from_what_a_smaller_one_learnt(no_knowledge):
    data = torch.randn(100, 1, 6, 6), torch.randint(4, (100,))
    model = _Net()
    ss.landscape(model, data, F.cross_entropy, grid=5)
    (knowledge,) = _autotune._known.values()
    measured = dict(knowledge.seconds)
    ss.landscape(model, data, F.cross_entropy, grid=9)
    assert set(knowledge.choices) == {25, 81} and set(measured) <= set(knowledge.seconds)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ss.SkipscopeError, match="unknown strategy"):
        ss.landscape(
            nn.Linear(2, 2), (torch.ones(2, 2), torch.ones(2, 2)), F.mse_loss, grid=3, strategy="magic"
        )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_lower_precision_is_an_explicit_choice_and_is_told(precision):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    data = torch.randn(50, 6), torch.randint(4, (50,))
    own = ss.landscape(model, data, F.cross_entropy, grid=5)
    other = ss.landscape(model, data, F.cross_entropy, grid=5, precision=precision)
    assert precision in other.provenance.dtype and other.checks.passed
    assert np.allclose(own.values, other.values, rtol=2e-2)
    assert np.array_equal(own.values, other.values) == (precision == "fp32")
    with pytest.raises(ss.SkipscopeError, match="unknown precision"):
        ss.landscape(model, data, F.cross_entropy, grid=5, precision="int3")


def test_a_later_choice_replaces_an_earlier_one():
    """A rank that loses the race for the store takes the store's way, whatever it had chosen itself."""
    from skipscope._data import read
    from skipscope.surfaces._landscape_settings import Settings
    from skipscope.surfaces.evaluation._twins_on_plane import make_twins

    model = _convolutional().eval()
    data, loss = read(
        model, (torch.randn(100, 1, 6, 6).double(), torch.randint(4, (100,))), F.cross_entropy, "test"
    )
    (twin,) = make_twins({"net": model}, data, loss, Settings(), 2)
    for wanted, name in (
        ("channels last, batches of 64", "channels last, batches of 64"),
        ("plain", "plain"),
        ("plain, a point a core", "plain, a point a core"),
    ):
        _autotune.choose(twin.evaluator, [(0.1, 0.2)], 9, wanted)
        assert twin.evaluator.strategy.name == name


# --- recorded ---


class _Functions(nn.Module):
    """Activations called as functions; one layer is read beside its activation; inputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x, scale=None):
        h = F.gelu(self.one(x), approximate="tanh") + self.shift
        g = self.two(h) if scale is None else self.two(h) * scale[:, None]
        return self.out(torch.relu(g) + F.silu(self.two(h)) + g)


class _Looks(_Functions):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else self.out(self.one(x))


class _ReadsANumber(_Functions):
    """A number out of a weight, unseen by the recording."""

    def forward(self, x):
        return super().forward(x) * self.one.weight.tolist()[0][0] * 30


class _ReadsATensor(_Functions):
    def forward(self, x):
        return super().forward(x) * torch.tensor(self.one.weight.tolist())[:, 0].mean() * 30


needs_one_dnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def _both(model, data, loss=F.cross_entropy):
    return [ss.landscape(model, data, loss, grid=5, strategy=s) for s in ("plain", "oneDNN, recorded")]


@needs_one_dnn
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_a_recorded_pass_gives_the_plain_loops_numbers(kind):
    torch.manual_seed(0)
    model, x, y, scale = _Functions(), torch.randn(100, 6), torch.randint(4, (100,)), torch.rand(100)
    part = {
        "tensor": lambda s: (x[s], y[s]),
        "tuple": lambda s: ((x[s], scale[s]), y[s]),
        "dict": lambda s: ({"x": x[s], "scale": scale[s]}, y[s]),
    }[kind]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain, other = _both(model, ss.batches([part(slice(0, 60)), part(slice(60, 100))]))
    assert other.provenance.strategy == "oneDNN, recorded", other.provenance.why
    assert np.allclose(other.values, plain.values, rtol=2e-6) and np.ptp(plain.values) > 0.1
    assert np.allclose(other.stderr, plain.stderr, rtol=1e-4) and other.checks.passed
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@needs_one_dnn
@pytest.mark.parametrize("kind", [_Looks, _ReadsANumber, _ReadsATensor])
def test_what_cannot_be_recorded_is_evaluated_plainly(kind):
    torch.manual_seed(0)
    model, data = kind(), (torch.randn(100, 6), torch.randint(4, (100,)))
    plain, other = _both(model, data)
    assert np.array_equal(plain.values, other.values) and other.provenance.strategy == "plain"
    assert "differs" in other.provenance.why or "does not run" in other.provenance.why


@needs_one_dnn
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_gelu_taken_in_is_the_one_that_was_called(approximate):
    """The two differ by up to 5e-4, which no tolerance on a loss would show."""
    from skipscope.surfaces.evaluation._recorded_forward import Recorded

    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 8)

        def forward(self, x):
            return F.gelu(self.lin(x), approximate=approximate)

    torch.manual_seed(0)
    model, x = Curved().requires_grad_(False), 3 * torch.randn(50, 6)
    expected = model(x)
    _onednn_linears.through_one_dnn(model, None)
    recorded = Recorded(model, lambda m, batch: m(batch[0]))
    assert torch.allclose(recorded(model, (x, None)), expected, rtol=0, atol=2e-6)


@needs_one_dnn
def test_activations_called_as_functions_are_taken_in():
    from skipscope.surfaces.evaluation._recorded_forward import Recorded

    torch.manual_seed(0)
    model, x = _Functions().requires_grad_(False), torch.randn(20, 6)
    expected = model(x)
    _onednn_linears.through_one_dnn(model, None)
    recorded = Recorded(model, lambda m, batch: m(batch[0]))
    assert torch.allclose(recorded(model, (x, None)), expected, rtol=1e-5, atol=1e-6)
    (graph,) = recorded.graphs.values()
    called = [str(node.target) for node in graph.graph.nodes]
    taken = [node.args[3] for node in graph.graph.nodes if "linear_pointwise" in str(node.target)]
    assert taken == ["gelu", "none", "swish", "none"] and "aten.gelu.default" not in called
    assert "aten.relu.default" in called, "its layer is read twice"
    with torch.no_grad():
        model.one.weight.mul_(2)
    assert not torch.allclose(recorded(model, (x, None)), expected), "weights move under the recording"


def test_seconds_are_those_of_one_point(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(_autotune.time, "perf_counter", lambda: next(clock))
    assert _autotune._timed(lambda points: "reading", [(0.0,)] * 4) == (1.5, "reading")
