"""What data and a loss are: every reading in definitions.md, and every refusal with its cure."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipscope as ss
from skipscope._data import as_batches, as_objective, mean_loss, read
from skipscope._errors import SkipscopeError

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
STOCK = {
    "cross_entropy": F.cross_entropy,
    "ignore_index": partial(F.cross_entropy, ignore_index=1),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "both, smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1, label_smoothing=0.1),
    "sum": nn.CrossEntropyLoss(reduction="sum", ignore_index=1),
    "partial of partial": partial(partial(F.cross_entropy, ignore_index=0), ignore_index=1),
}


def classification(n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    y[: n // 3] = 1  # the ignored class is not spread evenly over the batches
    return x, y


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 4).double()


@pytest.mark.parametrize("name", STOCK)
def test_batches_of_20_and_12_equal_one_batch_of_32(name, linear):
    x, y = classification(32)
    whole = read(linear, (x, y), STOCK[name], "test")
    parts = read(linear, ss.batches([(x[:20], y[:20]), (x[20:], y[20:])]), STOCK[name], "test")
    expected = float(STOCK[name](linear(x), y))
    assert mean_loss(linear, *whole) == pytest.approx(expected, rel=1e-12)
    assert mean_loss(linear, *parts) == pytest.approx(expected, rel=1e-12)


@given(
    cuts=st.lists(st.integers(1, 30), max_size=5), name=st.sampled_from(list(STOCK)), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_any_cut_gives_the_same_loss(cuts, name, seed):
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    x, y = classification(31, seed)
    edges = [0, *sorted(set(cuts)), 31]
    data = ss.batches([(x[a:b], y[a:b]) for a, b in pairwise(edges) if b > a])
    assert mean_loss(model, *read(model, data, STOCK[name], "test")) == pytest.approx(
        float(STOCK[name](model(x), y)), rel=1e-10
    )


@pytest.mark.parametrize("name", STOCK)
def test_per_sample_losses_add_up(name, linear):
    x, y = classification(32)
    numerators, denominators = as_objective(STOCK[name], "test").samples(linear(x), (x, y))
    assert numerators.shape == (32,)
    total = numerators.sum() if name == "sum" else numerators.sum() / denominators.sum()
    assert float(total.detach()) == pytest.approx(float(STOCK[name](linear(x), y).detach()), rel=1e-12)


@pytest.mark.parametrize(
    "loss", [F.mse_loss, nn.SmoothL1Loss(), F.binary_cross_entropy_with_logits, nn.HuberLoss()]
)
def test_losses_by_element(loss, linear):
    x, _ = classification(32)
    y = torch.rand(32, 4, dtype=torch.float64)
    data = ss.batches([(x[:5], y[:5]), (x[5:], y[5:])])
    assert mean_loss(linear, *read(linear, data, loss, "test")) == pytest.approx(
        float(loss(linear(x), y)), rel=1e-12
    )
    numerators, denominators = as_objective(loss, "test").samples(linear(x), (x, y))
    ratio = numerators.sum() / denominators.sum()
    assert float(ratio.detach()) == pytest.approx(float(loss(linear(x), y).detach()), rel=1e-12)


def test_a_loss_that_does_not_average_is_refused_and_weight_cures_it(linear):
    x, y = classification(32)
    data = ss.batches([(x[:20], y[:20]), (x[20:], y[20:])])

    def ignoring(output, target):
        return F.cross_entropy(output, target, ignore_index=1)

    with pytest.raises(SkipscopeError, match="weight=") as refusal:
        read(linear, data, ignoring, "landscape")
    assert refusal.value.operation == "landscape"
    read_data, loss = read(
        linear, data, ignoring, "landscape", weight=lambda batch: float((batch[1] != 1).sum())
    )
    assert mean_loss(linear, read_data, loss) == pytest.approx(float(ignoring(linear(x), y)), rel=1e-12)


class Causal(nn.Module):
    """A stand-in for a Hugging Face model: the output carries its loss, labels are shifted, -100 is ignored."""

    def __init__(self, shift: int):
        super().__init__()
        self.shift, self.head = shift, nn.Embedding(7, 7, dtype=torch.float64)

    def forward(self, input_ids, labels):
        logits = self.head(input_ids)[:, : input_ids.shape[1] - self.shift]
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), labels[:, self.shift :].flatten()),
            "logits": logits,
        }


@pytest.mark.parametrize("shift", [0, 1])
def test_the_outputs_own_loss_is_weighted_by_its_labels(shift):
    torch.manual_seed(0)
    model = Causal(shift)
    ids = torch.randint(0, 7, (12, 6))
    labels = ids.clone()
    labels[:4, 1:] = -100
    labels[0] = -100
    whole = float(model(ids, labels)["loss"])
    parts = ss.batches([{"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 5), (5, 7), (7, 12))])
    assert mean_loss(model, *read(model, parts, None, "test")) == pytest.approx(whole, rel=1e-12)


REFUSED = {
    "two batches in a list": (lambda x, y: [(x, y), (x, y)], "ss.batches"),
    "one batch in a list": (lambda x, y: [(x, y)], "ss.batches"),
    "three parts": (lambda x, y: (x, x, y), "((x1, x2), target)"),
    "nothing": (lambda x, y: [], "the data is empty"),
    "an iterator": (lambda x, y: iter([(x, y)]), "ss.batches(list(data))"),
    "an empty loader": (lambda x, y: range(0), "at least one batch"),
    "a bare tensor": (lambda x, y: x, "(inputs, target)"),
    "a number": (lambda x, y: 3, "this is not data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_cannot_be_read_is_refused_with_the_cure(name):
    make, cure = REFUSED[name]
    with pytest.raises(SkipscopeError) as refusal:
        as_batches(make(*classification(4)), "gradient_flow")
    assert cure in str(refusal.value)
    assert str(refusal.value).startswith("gradient_flow: ")


def test_an_empty_list_of_batches_is_refused():
    with pytest.raises(SkipscopeError, match="empty"):
        ss.batches([])


BAD_CALLS = {
    "a vector": (lambda x, y: ((x, y), lambda o, t: o.mean(0)), "not a scalar"),
    "no tensor": (lambda x, y: ((x, y), lambda o, t: 1.0), "not a scalar"),
    "wrong features": (lambda x, y: ((x[:, :3], y), F.cross_entropy), "(32, 3)"),
    "wrong target": (lambda x, y: ((x, y.double()), F.cross_entropy), "target"),
    "no loss": (lambda x, y: ((x, y), None), "carries none"),
    "not a loss": (lambda x, y: ((x, y), "cross_entropy"), "torch.nn.functional.cross_entropy"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_says_what_was_expected_and_got(name, linear):
    make, words = BAD_CALLS[name]
    data, loss = make(*classification(32))
    with pytest.raises(SkipscopeError) as refusal:
        batches, objective = read(linear, data, loss, "gradient_flow")
        objective(linear, batches.first())
    assert words in str(refusal.value)


def test_the_failing_layer_is_named():
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    batches, loss = read(model, (torch.ones(2, 5), torch.ones(2, 2)), F.mse_loss, "gradient_flow")
    with pytest.raises(SkipscopeError) as refusal:
        loss(model, batches.first())
    assert refusal.value.layer == "1.1"


def test_an_objective_takes_any_batch():
    @ss.objective
    def reconstruction(model, batch):
        return (model(batch) - batch).square().mean()

    model = nn.Linear(5, 5)
    data, loss = read(model, torch.ones(4, 5), reconstruction, "test")
    assert mean_loss(model, data, loss) > 0


def test_the_split_check_leaves_the_model_in_its_mode(linear):
    x, y = classification(32)
    model = nn.Sequential(linear, nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    read(model, ss.batches([(x, y), (x, y)]), F.cross_entropy, "test")
    assert model.training
    assert model[1].training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options", [{}, {"ignore_index": 2, "label_smoothing": 0.1, "weight": torch.arange(1.0, 12).double()}]
)
def test_classes_that_lie_side_by_side_give_the_same_per_sample_losses(options):
    from skipscope._torch_losses import stock_loss

    output, target = torch.randn(5, 7, 11, dtype=torch.float64).transpose(1, 2), torch.randint(11, (5, 7))
    target[0, :3] = 2
    stock = stock_loss(torch.nn.CrossEntropyLoss(**options))
    assert stock is not None
    for rows, columns in zip(stock.samples(output, target), stock.samples(output.contiguous(), target)):
        assert rows.shape == (5,) and torch.allclose(rows, columns, rtol=1e-13)
