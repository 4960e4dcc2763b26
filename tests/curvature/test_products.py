"""Products against dense oracles: modes, matrices, batches, losses, awkward models, and what is refused."""

import copy

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipscope as ss

from .oracle import dense_gauss_newton, dense_hessian, matrix_of, relative

MODES = ["reverse over reverse", "forward over reverse", "finite differences"]


def mlp(*, act=nn.Tanh, out=3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, out)).double()


def samples(n=12, out=3):
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(0, out, (n,))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("matrix", "oracle"), [("hessian", dense_hessian), ("gauss_newton", dense_gauss_newton)]
)
def test_every_mode_gives_the_dense_matrix(mode, matrix, oracle):
    model, (x, y) = mlp(), samples()
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy, matrix=matrix, mode=mode)
    assert operator.method.startswith(mode)
    truth = oracle(model, x, y, F.cross_entropy)
    assert relative(matrix_of(operator), truth) < (1e-8 if mode == "finite differences" else 1e-13)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES = {
    "mean": F.cross_entropy,
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS),
    "weighted sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "weighted and ignore_index": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
}


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_several_batches_equal_one(loss, matrix):
    model, (x, y) = mlp(), samples(32)
    one = ss.curvature_operator(model, (x, y), loss, matrix=matrix)
    cuts = [slice(0, 20), slice(20, 21), slice(21, 32)]
    many = ss.curvature_operator(model, ss.batches([(x[c], y[c]) for c in cuts]), loss, matrix=matrix)
    vectors = np.random.default_rng(0).standard_normal((one.shape[0], 3))
    assert relative(many @ vectors, one @ vectors) < 1e-10


def test_a_batch_that_counts_for_nothing_is_skipped():
    model, (x, y) = mlp(), samples(20)
    y[12:] = -100
    data = ss.batches([(x[:12], y[:12]), (x[12:], y[12:])])
    truth = dense_hessian(model, x[:12], y[:12], F.cross_entropy)
    assert relative(matrix_of(ss.curvature_operator(model, data, F.cross_entropy)), truth) < 1e-12


def test_batches_that_cannot_be_averaged_are_refused():
    model, (x, y) = mlp(), samples(20)

    def odd(output, target):
        return F.cross_entropy(output, target) * len(target) ** 0.5

    with pytest.raises(ss.SkipscopeError, match="weight="):
        ss.curvature_operator(model, ss.batches([(x[:12], y[:12]), (x[12:], y[12:])]), odd)


def test_a_graph_too_large_to_keep_is_built_anew():
    model, (x, y) = mlp(), samples(20)
    data = ss.batches([(x[:12], y[:12]), (x[12:], y[12:])])
    kept = ss.curvature_operator(model, data, F.cross_entropy)
    anew = ss.curvature_operator(model, data, F.cross_entropy, memory=0)
    truth = matrix_of(kept)
    some = ss.curvature_operator(model, data, F.cross_entropy, memory=kept.held_bytes - 1)
    assert kept.method == "reverse over reverse, cached graph"
    assert relative(matrix_of(anew), truth) < 1e-14 and anew.method == "reverse over reverse"
    assert relative(matrix_of(some), truth) < 1e-14 and "1 of 2" in some.method


def test_a_subset_of_the_parameters_is_a_block_of_the_matrix():
    model, (x, y) = mlp(), samples()
    truth = dense_hessian(model, x, y, F.cross_entropy)
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy, parameters="2.*")
    assert operator.layout.names == ("2.weight", "2.bias")
    assert relative(matrix_of(operator), truth[25:, 25:]) < 1e-13
    with pytest.raises(ss.SkipscopeError, match="no parameter is called 'layer'"):
        ss.curvature_operator(model, (x, y), F.cross_entropy, parameters="layer")


def test_frozen_parameters_are_left_out():
    model, (x, y) = mlp(), samples()
    model[0].requires_grad_(False)
    assert ss.curvature_operator(model, (x, y), F.cross_entropy).layout.names == ("2.weight", "2.bias")
    model.requires_grad_(False)
    with pytest.raises(ss.SkipscopeError, match="no parameter"):
        ss.curvature_operator(model, (x, y), F.cross_entropy)
    whole = ss.curvature_operator(model, (x, y), F.cross_entropy, parameters="*")
    assert relative(matrix_of(whole), dense_hessian(mlp_like(model), x, y, F.cross_entropy)) < 1e-13


def mlp_like(model):
    return copy.deepcopy(model).requires_grad_()


def test_it_is_a_scipy_operator():
    model, (x, y) = mlp(), samples()
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy)
    truth = np.linalg.eigvalsh(dense_hessian(model, x, y, F.cross_entropy))
    found = scipy.sparse.linalg.eigsh(operator, k=1, which="LA", return_eigenvectors=False)
    assert found[0] == pytest.approx(truth[-1], rel=1e-9)
    v = np.random.default_rng(0).standard_normal(operator.shape[0])
    assert np.array_equal(operator.rmatvec(v), operator.matvec(v))
    before = operator.products
    operator.matmat(np.eye(operator.shape[0])[:, :4])
    assert operator.products == before + 4


# --- awkward models ---


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, None, :] * torch.ones(1, 3, 1, dtype=x.dtype))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.GELU()), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class OldFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(Square.apply(self.body(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = (
            self.mix(x[:, None, :] * torch.arange(1, 4, dtype=x.dtype)[:, None])
            .reshape(len(x), 1, 3, 12)
            .split(4, dim=-1)
        )
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return torch.tanh(self.used(x))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 2, 3, padding=1),
            nn.BatchNorm1d(2),
            nn.Tanh(),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.body(x[:, None, :])


AWKWARD = {
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "checkpoint": Checkpointed,
    "custom Function": OldFunction,
    "attention": Attention,
    "tied weights": Tied,
    "unused parameters": Unused,
    "conv, batch norm, max-pool": Convolved,
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
    "old weight norm": lambda: nn.Sequential(
        torch.nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    "new weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
}


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_awkward_models_against_finite_differences_of_gradients(make, matrix):
    model, (x, y) = make().double().eval(), samples(6)
    model(x)  # an old weight norm now holds a tensor with a graph
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy, matrix=matrix)
    slow = ss.curvature_operator(model, (x, y), F.cross_entropy, matrix=matrix, mode="finite differences")
    found = matrix_of(operator)
    assert relative(found, matrix_of(slow)) < 1e-7
    assert relative(found, found.T) < 1e-12


def test_a_checkpoint_keeps_the_exact_way():
    assert ss.curvature_operator(Checkpointed().double(), samples(), F.cross_entropy).tried == {}


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_what_a_reentrant_checkpoint_hides_is_not_taken_for_zero(matrix):
    x, y = samples()
    with pytest.raises(ss.SkipscopeError, match="use_reentrant=False") as caught:
        ss.curvature_operator(
            Checkpointed(True).double(), (x.requires_grad_(), y), F.cross_entropy, matrix=matrix
        )
    assert caught.value.layer == "body.0.weight"
    behind = nn.Sequential(nn.Linear(4, 4), Checkpointed(True)).double()  # here torch refuses, in other words
    with pytest.raises(ss.SkipscopeError, match="use_reentrant=False"):
        ss.curvature_operator(behind, samples(), F.cross_entropy, matrix=matrix)


ACTIVATIONS = [
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(2.0), nn.LogSigmoid(), nn.ELU(), nn.ReLU(),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_shared_derivatives_change_no_number(act):
    model, (x, y) = mlp(act=lambda: act), samples()
    truth = dense_hessian(model, x, y, F.cross_entropy)
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy, mode="reverse over reverse")
    assert relative(matrix_of(operator), truth) < 1e-14
    model.float()
    single = ss.curvature_operator(model, (x.float(), y), F.cross_entropy)
    assert relative(matrix_of(single), truth) < 1e-5 and not single.tried


def test_flash_attention_falls_to_the_math_kernel():
    model, (x, y) = Attention().double().eval(), samples(6)
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy)
    flash = (
        torch._fused_sdp_choice(*[torch.zeros(6, 1, 3, 4, dtype=torch.float64, requires_grad=True)] * 3) == 1
    )
    assert ("math kernels" in operator.method) == flash
    assert not flash or set(operator.tried) == {"reverse over reverse", "forward over reverse"}


def test_what_cannot_be_differentiated_twice_falls_to_finite_differences():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tanh(x)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(Once.apply(self.body(x)))

    model, (x, y) = Stubborn().double(), samples()
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy)
    assert operator.method == "finite differences" and len(operator.tried) == 4
    twin = mlp()
    twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values())))
    assert relative(matrix_of(operator), dense_hessian(twin, x, y, F.cross_entropy)) < 1e-7


def test_batch_norm_and_dropout_in_training_mode_are_one_fixed_function():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    x, y = samples(20)
    for memory in (0, 1 << 30):
        found = matrix_of(ss.curvature_operator(model, (x, y), F.cross_entropy, training=True, memory=memory))
        assert relative(found, found.T) < 1e-12
        shift = np.zeros(found.shape[0])
        shift[20:25] = 1  # a bias before batch norm changes nothing
        assert np.abs(found @ shift).max() < 1e-12 * np.abs(found).max()


def test_hugging_face_style_batches_and_outputs():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x, labels=None):
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model, (x, y) = WithLoss().double(), samples()
    truth = dense_hessian(model.body, x, y, F.cross_entropy)
    assert relative(matrix_of(ss.curvature_operator(model, {"x": x, "labels": y})), truth) < 1e-13
    with pytest.raises(ss.SkipscopeError, match="Gauss-Newton"):
        ss.curvature_operator(model, {"x": x, "labels": y}, matrix="gauss_newton")
    gauss = ss.curvature_operator(
        model,
        {"x": x, "labels": y},
        lambda output, target: F.cross_entropy(output["logits"], target),
        matrix="gauss_newton",
    )
    assert relative(matrix_of(gauss), dense_gauss_newton(model.body, x, y, F.cross_entropy)) < 1e-12


# --- left as found, and refused ---


def test_the_model_is_left_as_found():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = samples(20)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads, versions = [p.grad for p in model.parameters()], [p._version for p in model.parameters()]
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    for options in (
        {"training": True},
        {"training": False},
        {"mode": "finite differences"},
        {"matrix": "gauss_newton"},
    ):
        ss.extreme_eigenvalues(model, (x, y), F.cross_entropy, **options)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    assert [p._version for p in model.parameters()] == versions
    assert all(m.training for m in model.modules())
    assert torch.equal(random[0], torch.get_rng_state()) and np.array_equal(
        random[1], np.random.get_state()[1]
    )


def test_the_operator_keeps_the_weights_of_its_day():
    model, (x, y) = mlp(), samples()
    operator = ss.curvature_operator(model, (x, y), F.cross_entropy, memory=0)
    before = matrix_of(operator)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert np.array_equal(matrix_of(operator), before)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_nan_names_the_batch_and_the_cause(memory):
    model, (x, y) = mlp(), samples(30)
    x[25] = float("nan")
    data = ss.batches([(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])])
    operator = ss.curvature_operator(model, data, F.cross_entropy, memory=memory)
    with pytest.raises(ss.SkipscopeError, match="batch 2: the loss itself is nan"):
        operator.matvec(np.ones(operator.shape[0]))


def test_an_infinite_second_derivative_is_told_from_a_bad_loss():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x):
            return (self.w.abs() ** 1.5).sum() + 0 * x.sum()

    model, x = Root(), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ss.SkipscopeError, match="second derivative is not") as caught:
        ss.extreme_eigenvalues(model, (x, x), lambda output, target: output)
    assert caught.value.layer == "w"


def test_a_user_error_comes_out_as_such():
    model, (x, y) = mlp(), samples()
    with pytest.raises(ss.SkipscopeError, match="does not accept this input"):
        ss.curvature_operator(model, (x[:, :3], y), F.cross_entropy)
    with pytest.raises(ss.SkipscopeError, match="unknown matrix"):
        ss.curvature_operator(model, (x, y), F.cross_entropy, matrix="fisher")
    with pytest.raises(ss.SkipscopeError, match="unknown mode"):
        ss.curvature_operator(model, (x, y), F.cross_entropy, mode="magic")
