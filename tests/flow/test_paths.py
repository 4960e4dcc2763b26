"""Path lengths against the enumeration of all paths, closed forms, and the plain gradient."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipscope as ss
from flow import oracles

mse = nn.functional.mse_loss


def square(output):
    return output.square().mean()


def objective(output, target):
    return square(output)


def check(model, x, wrt=None, of=None, **options):
    paths = ss.path_spectrum(model, (x, torch.zeros(1)), objective, wrt=wrt, **options)
    expected = np.array(
        [float(torch.as_tensor(g).norm()) for g in oracles.by_enumeration(model, square, x, of)]
    )
    n = len(paths.norms)
    assert np.allclose(expected[n:], 0, atol=1e-13 * expected.max())
    scale = expected.max()
    np.testing.assert_allclose(paths.norms, expected[:n], rtol=1e-10, atol=1e-13 * scale)
    assert paths.residual < 1e-13
    return paths


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 10])
def test_a_chain_equals_the_enumeration_of_all_paths(length):
    paths = check(oracles.chain(length), torch.randn(4, 6, dtype=torch.float64))
    assert paths.branches == length


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", [{"scale": 0.5}, {"in_place": True}])
def test_scaled_and_in_place(options, batched):
    check(oracles.chain(5, **options), torch.randn(4, 6, dtype=torch.float64), batched=batched)


@pytest.mark.parametrize("a", [0.1, -0.7, 2.0])
def test_a_linear_chain_is_binomial(a):
    """x -> x + a x, L times: G_k = C(L, k) a^k of the gradient at the end."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(a * torch.eye(3, dtype=torch.float64))

        def forward(self, x):
            return x + nn.functional.linear(x, self.weight)

    length, x = 60, torch.randn(5, 3, dtype=torch.float64)
    model = nn.Sequential(*[Scale() for _ in range(length)])
    paths = ss.path_spectrum(model, (x, x), lambda output, target: (output * target).sum())
    expected = np.array([math.comb(length, k) * abs(a) ** k * float(x.norm()) for k in range(length + 1)])
    np.testing.assert_allclose(paths.norms, expected, rtol=1e-11)
    k = np.arange(length + 1)
    assert paths.mean_length == pytest.approx((k * expected).sum() / expected.sum(), rel=1e-11)


parts = st.deferred(
    lambda: st.one_of(
        st.just("layer"),
        st.tuples(
            st.sampled_from(
                ["residual", "in_place", "scaled", "projected", "dense", "post", "overwritten", "gated"]
            ),
            parts,
        ),
        st.tuples(st.just("chain"), parts, parts),
        st.tuples(st.just("dense_block"), st.integers(1, 3)),
    )
)


def build(part, width=4):
    if part == "layer":
        return oracles.layer(width)
    kind, *inner = part
    if kind == "chain":
        return oracles.Chain(*[build(p, width) for p in inner])
    if kind == "dense_block":
        return oracles.DenseBlock(width, inner[0])
    first = oracles.Chain(nn.Linear(width, width), build(inner[0], width))
    if kind == "projected":
        return oracles.Projected(width, oracles.Chain(first, nn.Tanh(), nn.Linear(width, width)))
    if kind == "post":
        return oracles.PostActivation(first)
    if kind == "overwritten":
        return oracles.Overwritten(first)
    if kind == "gated":
        return oracles.Gated(first, width)
    if kind == "dense":
        return oracles.Dense(width, first)
    return oracles.Residual(first, scale=0.5 if kind == "scaled" else None, in_place=kind == "in_place")


@settings(max_examples=60, deadline=None)
@given(parts, st.integers(0, 10**6), st.booleans())
def test_random_nested_graphs_equal_the_enumeration(part, seed, batched):
    torch.manual_seed(seed)
    model = oracles.Chain(nn.Linear(4, 4), build(part), nn.Linear(4, 2)).double()
    marks = sum(isinstance(m, oracles.Branch) for m in model.modules())
    if marks > 7:
        return
    x = torch.randn(3, 4, dtype=torch.float64)
    assert len(ss.find_shortcuts(model, x)) == marks
    check(model, x, batched=batched)


@pytest.mark.parametrize("name", ["parts.1.inner.0.weight", "parts.0.inner.0.bias", "parts.4.weight"])
def test_back_to_a_parameter(name):
    model = oracles.chain(4)
    x = torch.randn(4, 6, dtype=torch.float64)
    parameter = dict(model.named_parameters())[name]
    check(model, x, wrt=name, of=parameter)
    check(model, x, wrt=parameter, of=parameter, batched=False)


def test_back_to_a_merge_in_the_middle():
    model = oracles.chain(6)
    x = torch.randn(4, 6, dtype=torch.float64)
    middle = ss.gradient_flow(model, (x, x[:, :3]), mse).boundaries[3]
    assert middle.kind == "merge"
    paths = ss.path_spectrum(model, (x, x[:, :3]), mse, wrt=middle.name)
    with torch.no_grad():
        inner = oracles.Chain(*model.parts[:3])(x)
    rest = oracles.Chain(*model.parts[3:])
    expected = oracles.by_enumeration(rest, lambda output: mse(output, x[:, :3]), inner)
    np.testing.assert_allclose(paths.norms, [float(g.norm()) for g in expected], rtol=1e-10)


def test_two_batches_are_one():
    model, x = oracles.chain(4), torch.randn(10, 6, dtype=torch.float64)
    y = torch.randint(0, 3, (10,))
    whole = ss.path_spectrum(model, (x, y), nn.functional.cross_entropy)
    parts = ss.path_spectrum(model, ss.batches([(x[:7], y[:7]), (x[7:], y[7:])]), nn.functional.cross_entropy)
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=1e-12)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    name = "parts.1.inner.0.weight"
    whole = ss.path_spectrum(model, (x, y), nn.functional.cross_entropy, wrt=name)
    parts = ss.path_spectrum(
        model, ss.batches([(x[:7], y[:7]), (x[7:], y[7:])]), nn.functional.cross_entropy, wrt=name
    )
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=1e-12)


def test_memory_is_bounded_without_changing_the_answer():
    model, x = oracles.chain(8), torch.randn(4, 6, dtype=torch.float64)
    whole = ss.path_spectrum(model, (x, x[:, :3]), mse)
    small = ss.path_spectrum(model, (x, x[:, :3]), mse, max_bytes=1500)
    np.testing.assert_allclose(small.norms, whole.norms, rtol=1e-13)


class Marked(torch.autograd.Function):
    """The identity, whose piece of the graph holds something that can be seen to go."""

    @staticmethod
    def forward(ctx, x, marks):
        ctx.mark = Line(0, 0)
        marks.append(weakref.ref(ctx.mark))
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


@pytest.mark.parametrize("batched", [True, False])
def test_memory_at_two_cuts_at_a_time_and_passed_pieces_are_freed(monkeypatch, batched):
    from skipscope.flow.paths import _segments

    length, x = 24, torch.randn(4, 6, dtype=torch.float64)
    model, waiting, alive, biggest = oracles.chain(length), [], [], []
    propagate, grad = _segments.PathLengthBackward.propagate_pending, _segments._grad

    def propagated(backward):
        propagate(backward)
        held = [*backward.at_leaves.values(), *(gradients for _, gradients in backward.pending.values())]
        storages = {g.rows.untyped_storage().data_ptr(): g.rows.untyped_storage().nbytes() for g in held}
        waiting.append(sum(storages.values()))
        alive.append(sum(ref() is not None for ref in hidden))

    def counted(ends, rows, sources, **how):
        gradients = grad(ends, rows, sources, **how)
        biggest.append(sum(t.numel() * t.element_size() for t in (*rows, *gradients) if t is not None))
        return gradients

    hidden = []
    for block in model.parts[:-1]:
        block.inner[1].register_forward_hook(lambda module, args, output: Marked.apply(output, hidden))
    monkeypatch.setattr(_segments.PathLengthBackward, "propagate_pending", propagated)
    monkeypatch.setattr(_segments, "_grad", counted)
    one = x.numel() * x.element_size()
    ss.path_spectrum(model, (x, x[:, :3]), mse, max_bytes=10 * one, batched=batched)
    assert max(waiting) <= 2 * (length + 1) * one
    assert max(biggest) <= 10 * one
    assert len(alive) == length and alive[-1] <= alive[0] - length + 2


def test_dropout_is_the_same_in_both_passes():
    model = nn.Sequential(
        *[oracles.Residual(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))) for _ in range(4)]
    ).double()
    paths = ss.path_spectrum(model, (torch.randn(4, 6).double(), torch.zeros(4, 6).double()), mse)
    assert paths.residual < 1e-13


def test_known_networks_sum_to_the_plain_gradient():
    for model, batch in (
        (ss.reference.resnet20(), ss.reference.digits(8)),
        (ss.reference.deep_mlp(12, 16, shortcut="identity"), ss.reference.digits(8)),
        (ss.reference.gpt(), ss.reference.english(2)),
    ):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        paths = ss.path_spectrum(model, batch, nn.functional.cross_entropy)
        assert paths.residual < 1e-4
        assert len(paths.norms) == len(ss.find_shortcuts(model, batch[0])) + 1


def test_what_cannot_be_reached_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), oracles.Severed(), nn.Linear(3, 3))
    batch = torch.randn(2, 3), torch.zeros(2, 3)
    with pytest.raises(ss.SkipscopeError, match="no path leads from the loss to input"):
        ss.path_spectrum(model, batch, mse)
    with pytest.raises(ss.SkipscopeError, match="neither a boundary nor a parameter"):
        ss.path_spectrum(model, batch, mse, wrt="nowhere")


def test_the_oracle_can_fail():
    model, x = oracles.chain(3), torch.randn(4, 6, dtype=torch.float64)
    good = oracles.by_enumeration(model, square, x)
    with torch.no_grad():
        model.parts[1].inner[0].weight.mul_(1.001)
    bad = oracles.by_enumeration(model, square, x)
    assert float((good[1] - bad[1]).norm()) > 1e-6 * float(good[1].norm())


@pytest.mark.parametrize("a, length", [(0.02, 300), (1.0, 300), (0.5, 500)])
def test_the_estimate_of_very_deep_networks_is_within_its_error(a, length):
    """x -> x + a x: G_k = C(L, k) a^k of the gradient at the end, in a band around L a / (1 + a)."""
    scale = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        scale.weight.copy_(a * torch.eye(3, dtype=torch.float64))
    model = nn.Sequential(*[oracles.Residual(scale) for _ in range(length)])
    x = torch.randn(2, 3, dtype=torch.float64)
    paths = ss.path_spectrum(model, (x, x), lambda output, target: (output * target).sum())
    k = np.arange(length + 1)
    logs = [
        math.lgamma(length + 1) - math.lgamma(i + 1) - math.lgamma(length - i + 1) + i * math.log(a)
        for i in k
    ]
    expected = np.exp(logs) * float(x.norm())
    assert paths.method.startswith("estimate") and paths.branches == length
    assert (np.abs(paths.norms - expected) <= paths.errors + 1e-9 * expected.max()).all()
    assert paths.errors.max() < 1e-6 * expected.max()
    assert paths.mean_length == pytest.approx(length * a / (1 + a), rel=1e-6)
    assert paths.residual < 1e-12


class Parallel(nn.Module):
    """Two branches side by side, added up in some order."""

    def __init__(self, way, width=6):
        super().__init__()
        self.a, self.b, self.mark, self.way = (
            oracles.layer(width),
            oracles.layer(width),
            oracles.Branch(),
            way,
        )

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.mark(a + b) + x if self.way is None else PARALLEL[self.way](x, a, b)


def added_in_place(x, a, b):
    y = x + a
    y += b
    return y


PARALLEL = {
    "from the left": lambda x, a, b: x + a + b,
    "x in the middle": lambda x, a, b: a + x + b,
    "from the right": lambda x, a, b: b + (x + a),
    "in place": added_in_place,
}


@pytest.mark.parametrize("way", PARALLEL)
def test_parallel_branches_are_one_branch_in_whatever_order_they_are_added(way):
    def network(way):
        return oracles.Chain(nn.Linear(6, 6), *[Parallel(way) for _ in range(3)], nn.Linear(6, 3)).double()

    model, canonical, x = network(way), network(None), torch.randn(4, 6, dtype=torch.float64)
    canonical.load_state_dict(model.state_dict())
    batch, names = (x, x[:, :3]), [s.name for s in ss.find_shortcuts(canonical, x)]
    assert [s.name for s in ss.find_shortcuts(model, x)] == names
    expected = [float(g.norm()) for g in oracles.by_enumeration(canonical, lambda y: mse(y, x[:, :3]), x)]
    paths = ss.path_spectrum(model, batch, mse)
    np.testing.assert_allclose(paths.norms, expected, rtol=1e-10)
    assert paths.residual < 1e-13
    back = ss.path_spectrum(model, batch, mse, wrt=names[1])
    np.testing.assert_allclose(
        back.norms[:2], ss.path_spectrum(canonical, batch, mse, wrt=names[1]).norms, rtol=1e-10
    )
    assert not back.norms[2:].any()
    for a, b in zip(
        ss.gradient_split(model, batch, mse), ss.gradient_split(canonical, batch, mse), strict=True
    ):
        assert (a.branch_rms, a.shortcut_rms, a.cosine) == pytest.approx(
            (b.branch_rms, b.shortcut_rms, b.cosine)
        )
        assert a.residual < 1e-14
    for a, b in zip(ss.importance(model, batch, mse), ss.importance(canonical, batch, mse), strict=True):
        assert (a.removed.loss, a.lesioned.loss) == pytest.approx(
            (b.removed.loss, b.lesioned.loss), rel=1e-10
        )


class Line(nn.Module):
    """c x + a x: lengths in a band around a / (a + c) of the branches."""

    def __init__(self, c, a):
        super().__init__()
        self.c, self.f = c, nn.Linear(4, 4, bias=False)
        self.f.weight.data = a * torch.eye(4)

    def forward(self, x):
        return self.c * x + self.f(x)


class SideBySide(nn.Module):
    def __init__(self, *sides):
        super().__init__()
        self.stem, self.sides = nn.Linear(4, 4), nn.ModuleList(sides)

    def forward(self, x):
        x = self.stem(x)
        return torch.stack([side(x) for side in self.sides]).tanh().sum(0)


@pytest.mark.parametrize("bands", [[(350, 0.1, 0.9), (50, 0.99, 0.01)], [(300, 0.1, 0.9), (300, 0.95, 0.05)],
                                   [(280, 0.02, 0.98), (260, 0.5, 0.5), (20, 0.99, 0.01)]])  # fmt: skip
def test_the_estimate_knows_when_lengths_do_not_fit_its_window(bands):
    """Two bands more than 256 apart are folded onto each other; neither the sum nor the window's ends would show it."""
    torch.manual_seed(0)
    model = SideBySide(*[nn.Sequential(*[Line(c, a) for _ in range(n)]) for n, c, a in bands]).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    exact = ss.path_spectrum(model, (x, x), mse, exact=True)
    estimate = ss.path_spectrum(model, (x, x), mse, exact=False)
    wrong = np.zeros(len(estimate.norms))
    wrong[: len(exact.norms)] = exact.norms
    wrong = np.abs(wrong - estimate.norms)
    assert wrong.max() > 0.01 * exact.norms.max() and estimate.residual < 1e-12
    assert (wrong <= estimate.errors).all()


def test_the_estimate_of_a_shallow_network_is_exact():
    model, x = oracles.chain(6), torch.randn(4, 6, dtype=torch.float64)
    exact = ss.path_spectrum(model, (x, x[:, :3]), mse)
    estimate = ss.path_spectrum(model, (x, x[:, :3]), mse, exact=False)
    np.testing.assert_allclose(estimate.norms, exact.norms, atol=1e-14)


def test_the_table_has_a_row_a_length():
    x = torch.randn(4, 6, dtype=torch.float64)
    paths = ss.path_spectrum(oracles.chain(3), (x, torch.zeros(1)), objective)
    table = paths.table()
    assert table.columns == ["branches crossed", "|gradient|", "share"]
    total = paths.norms.sum()
    assert table.rows == [[k, float(n), pytest.approx(n / total)] for k, n in enumerate(paths.norms)]
    estimated = replace(paths, errors=paths.norms / 10).table()
    assert estimated.columns == [*table.columns, "error"]
    assert [row[3] for row in estimated.rows] == list(paths.norms / 10)


class NotInBatches(torch.autograd.Function):
    """The identity, whose backward looks at a number, which it cannot for several gradients at once."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g if g.sum().item() < math.inf else None


def test_the_method_says_how_segments_were_passed():
    x = torch.randn(4, 6, dtype=torch.float64)
    found = {
        batched: ss.path_spectrum(oracles.chain(3), (x, torch.zeros(1)), objective, batched=batched).method
        for batched in (True, False)
    }
    assert found == {True: "batched", False: "loop"}
    # From the loss: some blocks in batches, then one that cannot be.
    first = nn.Sequential(oracles.layer(6), oracles.Residual(oracles.layer(6))).double()
    last = oracles.chain(4)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x):
            return self.last(NotInBatches.apply(self.first(x)))

    paths = ss.path_spectrum(Both(), (x, torch.zeros(1)), objective)
    assert paths.method == "mixed"
    assert paths.residual < 1e-13


def test_all_lengths_of_a_small_network_are_passed_at_once(monkeypatch):
    from skipscope.flow.paths import _segments

    sizes, chunk = [], _segments.PathLengthBackward.vjp_chunk
    monkeypatch.setattr(
        _segments.PathLengthBackward,
        "vjp_chunk",
        lambda self, ends, rows, sources: (sizes.append(len(rows[0])), chunk(self, ends, rows, sources))[1],
    )
    ss.path_spectrum(oracles.chain(5), (torch.randn(4, 6, dtype=torch.float64), torch.zeros(1)), objective)
    assert max(sizes) == 5
