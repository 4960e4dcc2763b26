"""Batches whose size is not seen, loaders whose passes differ, losses that are no mean: right, or refused with the cure."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import skipscope as ss
from skipscope._batches import sample_count
from skipscope._data import as_batches, mean_loss, read
from skipscope._errors import SkipscopeError


class Graph:
    """A batch of one's own: it can be unpacked, and moved to a device, and is no loader."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        yield self.x
        yield self.y


class ReadsGraphs(nn.Linear):
    def forward(self, graph):
        return super().forward(graph.x)


@ss.objective
def of_graph(model, graph):
    return F.cross_entropy(model(graph.x), graph.y)


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return nn.Linear(6, 3).double()


def mean_of(model, batches, loss, **options):
    return mean_loss(model, *read(model, batches, loss, "test", **options))


def halves(x, y, kind=tuple):
    return ss.batches([kind((x[:36], y[:36])), kind((x[36:], y[36:]))])


def test_batches_of_own_objects_are_refused_and_weight_makes_them_right(data, linear):
    x, y = data
    graphs = ss.batches([Graph(x[:36], y[:36]), Graph(x[36:], y[36:])])
    with pytest.raises(SkipscopeError, match=r"(?s)no number of samples.*a Graph.*weight=lambda batch"):
        mean_of(linear, graphs, of_graph)
    found = mean_of(linear, graphs, of_graph, weight=lambda graph: len(graph.y))
    assert found == pytest.approx(float(F.cross_entropy(linear(x), y).detach()), rel=1e-12)


def test_batches_of_arrays_are_refused_and_weight_makes_them_right(data, linear):
    x, y = data
    arrays = halves(x.numpy(), y.numpy())

    def loss(model, batch):
        return F.cross_entropy(model(torch.from_numpy(batch[0])), torch.from_numpy(batch[1]))

    with pytest.raises(SkipscopeError, match="weight=lambda batch"):
        mean_of(linear, arrays, ss.objective(loss))
    found = mean_of(linear, arrays, ss.objective(loss, weight=lambda batch: len(batch[0])))
    assert found == pytest.approx(float(F.cross_entropy(linear(x), y).detach()), rel=1e-12)


def test_a_stock_loss_of_graphs_has_its_own_normaliser(data, linear):
    x, y = data
    model = ReadsGraphs(6, 3).double()
    model.load_state_dict(linear.state_dict())
    batches = ss.batches([(Graph(x[:36], None), y[:36]), (Graph(x[36:], None), y[36:])])
    found = mean_of(model, batches, F.cross_entropy)
    assert found == pytest.approx(float(F.cross_entropy(linear(x), y).detach()), rel=1e-12)
    with pytest.raises(SkipscopeError, match=r"(?s)cannot be cut in two.*weight="):
        mean_of(model, batches, lambda output, target: F.cross_entropy(output, target))


@pytest.mark.parametrize(
    "one", [np.ones((4, 6)), Graph(torch.ones(4, 6), torch.zeros(4))], ids=["array", "graph"]
)
def test_an_object_that_is_a_batch_is_not_iterated(one):
    batches = as_batches(one, "test", any_shape=True)
    assert batches.single and batches.first() is one


def test_a_loader_that_holds_tensors_is_iterated():
    class Loader:
        def __init__(self):
            self.x = torch.arange(6.0)

        def __iter__(self):
            return iter(self.x.split(2))

    batches = as_batches(Loader(), "test", any_shape=True)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]


def test_a_stream_loses_no_batch_and_is_refused_in_a_second_pass(data, linear):
    class Stream(IterableDataset):
        def __init__(self):
            self.rest = iter(list(zip(*data)))

        def __iter__(self):
            return self.rest

    batches, loss = read(linear, DataLoader(Stream(), 8), F.cross_entropy, "test")
    whole = float(F.cross_entropy(linear(data[0]), data[1]).detach())
    assert mean_loss(linear, batches, loss) == pytest.approx(whole, rel=1e-12)
    assert torch.equal(batches.first()[0], data[0][:8])
    with pytest.raises(
        SkipscopeError, match=r"(?s)another number of batches.*5 batches.*0, .*ss.batches\(list"
    ):
        mean_loss(linear, batches, loss)


@pytest.mark.parametrize("later", [2, 6])
def test_a_loader_with_another_number_of_batches_later_is_refused(later, data, linear):
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            for i in range(4 if self.passes < 3 else later):
                yield data[0][5 * i : 5 * i + 5], data[1][5 * i : 5 * i + 5]

    with pytest.raises(SkipscopeError, match=r"extreme_eigenvalues: the data has another number of batches"):
        ss.extreme_eigenvalues(linear, Changing(), F.cross_entropy)


def contrast(output, target):
    output = F.normalize(output, dim=1)
    return F.cross_entropy(output @ output.T, torch.arange(len(output)))


def test_a_weight_that_was_given_is_not_checked(data, linear):
    x, y = data
    batches = ss.batches([(x[:30], y[:30]), (x[30:], y[30:])])
    first, second = (float(contrast(linear(part), None).detach()) for part in (x[:30], x[30:]))
    found = mean_of(linear, batches, contrast, weight=lambda batch: 1.0)
    assert found == pytest.approx((first + second) / 2, rel=1e-12)
    with pytest.raises(
        SkipscopeError, match=r"(?s)samples of a batch interact.*one batch, or weight=lambda batch: 1.0"
    ):
        mean_of(linear, batches, contrast)


IMAGE = torch.rand(3, 8, 9)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (([IMAGE] * 4, [torch.tensor(0)] * 4), None),
        (([IMAGE] * 4, torch.zeros(4)), None),
        ((([IMAGE] * 3,), torch.zeros(3)), None),
        (([IMAGE] * 2, [{"boxes": torch.ones(5, 4)}] * 2), None),
        ((torch.ones(4, 7), torch.ones(28)), None),
        (([torch.ones(4, 2), torch.ones(4, 3)], (torch.ones(4), torch.ones(4))), 4),
        ((torch.ones(4, 2), torch.tensor(0.1)), 4),
        ({"input_ids": torch.ones(4, 9), "labels": torch.ones(4, 9)}, 4),
        ((torch.ones(5, 2), torch.ones(5), torch.ones(5)), 5),
        (torch.tensor(1.0), None),
    ],
)  # fmt: skip
def test_how_many_samples_are_seen(batch, count):
    assert sample_count(batch) == count


def test_a_list_or_a_dict_that_the_model_wants_whole_has_the_cure_that_works():
    class OfList(nn.Linear):
        def forward(self, images):
            return torch.cat([super(OfList, self).forward(image.mean((1, 2))[None]) for image in images])

    class OfDict(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs["x"])

    images, y = [torch.rand(3, 8, 9 + i) for i in range(4)], torch.tensor([0, 1, 0, 1])
    with pytest.raises(SkipscopeError, match=r"to hand over the list itself: \(\(images,\), target\)"):
        ss.landscape(OfList(3, 2), (images, y), F.cross_entropy, grid=(3,))
    assert np.isfinite(ss.landscape(OfList(3, 2), ((images,), y), F.cross_entropy, grid=(3,)).values).all()
    inputs = {"x": torch.rand(4, 3)}
    with pytest.raises(SkipscopeError, match=r"to hand over the dict itself: \(\({...},\), target\)"):
        ss.landscape(OfDict(3, 2), (inputs, y), F.cross_entropy, grid=(3,))
    assert np.isfinite(ss.landscape(OfDict(3, 2), ((inputs,), y), F.cross_entropy, grid=(3,)).values).all()
