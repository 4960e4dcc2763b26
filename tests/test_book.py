"""The lecture's experiment: its code as written, its numbers, and that every figure of the text is computed."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from skipscope import SkipscopeError, book
from skipscope._result import dumps, loads

WITHOUT = [2.0173587e-4, 1.2011161e-4, 7.1520405e-4, 1.3988736e-3, 5.0496454e-3]
WITH = [0.22169793, 0.20694108, 0.32896999, 0.26657322, 1.32585418]

LECTURE = """
import torch
from torch import nn
from skipscope.book import GELU, ExampleDeepNeuralNetwork, print_gradients

layer_sizes = [3, 3, 3, 3, 3, 1]

sample_input = torch.tensor([[1., 0., -1.]])

torch.manual_seed(123)
model_without_shortcut = ExampleDeepNeuralNetwork(
    layer_sizes, use_shortcut=False
)
print_gradients(model_without_shortcut, sample_input)

torch.manual_seed(123)
model_with_shortcut = ExampleDeepNeuralNetwork(
    layer_sizes, use_shortcut=True
)
print_gradients(model_with_shortcut, sample_input)
"""


def written(text):
    return re.findall(r"^(\S+) has gradient mean of (\S+)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def result():
    return book.experiment(200)


def test_the_lectures_code_runs_as_written(capsys):
    exec(LECTURE, {})
    names, values = zip(*written(capsys.readouterr().out))
    assert names == tuple(f"layers.{i}.0.weight" for i in range(5)) * 2
    np.testing.assert_allclose([float(v) for v in values], WITHOUT + WITH, rtol=1e-5)


class LecturesNetwork(nn.Module):
    """The lecture's class, letter for letter (its GELU apart)."""

    def __init__(self, layer_sizes, use_shortcut):
        super().__init__()
        self.use_shortcut = use_shortcut
        self.layers = nn.ModuleList([
            nn.Sequential(nn.Linear(layer_sizes[i], layer_sizes[i + 1]), nn.GELU(approximate="tanh")) for i in range(5)
        ])  # fmt: skip

    def forward(self, x):
        for layer in self.layers:
            layer_output = layer(x)
            if self.use_shortcut and x.shape == layer_output.shape:  # noqa: SIM108
                x = x + layer_output
            else:
                x = layer_output
        return x


@pytest.mark.parametrize("use_shortcut", [False, True])
def test_the_network_is_the_lectures(use_shortcut):
    sizes = [3, 5, 5, 4, 4, 2]
    theirs, ours = LecturesNetwork(sizes, use_shortcut), book.ExampleDeepNeuralNetwork(sizes, use_shortcut)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_any_number_of_layers():
    for sizes in ([2, 1], [3] * 40):
        model = book.ExampleDeepNeuralNetwork(sizes, use_shortcut=True)
        assert len(model.layers) == len(sizes) - 1
        assert model(torch.ones(1, sizes[0])).shape == (1, sizes[-1])


def test_print_gradients_leaves_the_model_as_found(capsys):
    model = book.ExampleDeepNeuralNetwork([3, 3, 1], use_shortcut=True)
    model.layers[0][0].weight.grad = kept = torch.ones(3, 3)
    book.print_gradients(model, torch.ones(1, 3))
    first = capsys.readouterr().out
    book.print_gradients(model, torch.ones(1, 3))
    assert capsys.readouterr().out == first
    assert model.layers[0][0].weight.grad is kept and model.layers[1][0].weight.grad is None


def test_figures_of_the_experiment(result):
    np.testing.assert_allclose([m.without for m in result.gradient_means], WITHOUT, rtol=1e-5)
    np.testing.assert_allclose([m.with_shortcuts for m in result.gradient_means], WITH, rtol=1e-5)
    assert round(result.gradient_means[0].factor) == 1099
    assert round(result.gradient_means[-1].factor) == 263
    assert result.loss.without == pytest.approx(0.0037, abs=5e-5)
    assert result.loss.with_shortcuts == pytest.approx(0.588, abs=5e-4)
    assert result.first_over_last.without == pytest.approx(0.040, abs=5e-4)
    assert result.first_over_last.with_shortcuts == pytest.approx(0.167, abs=5e-4)


def test_distribution_is_that_of_the_facts():
    result = book.experiment(1000)
    assert result.median_first_over_last.without == pytest.approx(0.010, abs=5e-4)
    assert result.median_first_over_last.with_shortcuts == pytest.approx(0.117, abs=5e-4)
    assert result.share_better == pytest.approx(0.977, abs=2e-3)
    assert result.share_ever_smaller.without == pytest.approx(0.47, abs=5e-3)


def test_seed_means_manual_seed(result):
    torch.manual_seed(7)
    model = book.ExampleDeepNeuralNetwork([3, 3, 3, 3, 3, 1], use_shortcut=False)
    nn.functional.mse_loss(model(torch.tensor([[1.0, 0.0, -1.0]])), torch.zeros(1, 1)).backward()
    means = [p.grad.abs().mean().item() for n, p in model.named_parameters() if "weight" in n]
    np.testing.assert_allclose(result.means_without[7], means, rtol=1e-6)


def test_the_text_fits_80_columns_and_holds_the_lectures_lines(result):
    text = str(result)
    assert max(map(len, text.splitlines())) <= 80
    assert len(written(text)) == 10
    for figure in ("1,099-fold", "263-fold", "4.2-fold", "0.588", "seeds 0 to 199"):
        assert figure in text


def test_every_figure_of_the_text_is_computed():
    planted = book.BookExperiment(
        layers=("a", "b"),
        gradient_means=(book.Growth(1.0, 70.0), book.Growth(2.0, 20.0)),
        loss=book.Growth(3.0, 9.0),
        means_without=np.array([[1.0, 2.0], [4.0, 2.0]]),
        means_with=np.array([[3.0, 2.0], [1.0, 2.0]]),
    )
    text = " ".join(str(planted).split())
    for figure in (
        "70-fold",
        "10-fold",
        "0.500 -> 3.50, 7-fold",
        "50.0% of the seeds",
        "seed it holds",
        "3.00 to 9.00",
    ):
        assert figure in text
    for lectures in ("1,099", "263", "97.7", "46.6"):
        assert lectures not in text


def test_saves_and_loads(result):
    again = loads(dumps(result))
    assert str(again) == str(result) and again.table().rows == result.table().rows


def test_random_state_is_left_alone():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    book.experiment(3)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_no_seeds_is_refused():
    with pytest.raises(SkipscopeError, match="1 or more"):
        book.experiment(0)


def test_the_batch_of_draws_has_each_seeds_own_numbers():
    result = book.experiment(12)
    for seed in (0, 5, 11):
        for network, means in zip(book._both(seed), (result.means_without, result.means_with)):
            assert means[seed] == pytest.approx(list(network.gradient_means.values()), rel=5e-6)
