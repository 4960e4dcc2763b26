"""The lecture's experiment: mean gradients of five layers with and without shortcuts, and what it shows.

The lecture's own code runs unchanged after these imports::

    import torch
    from torch import nn
    from skipscope.book import GELU, ExampleDeepNeuralNetwork, print_gradients

All numbers in the text of :class:`BookExperiment` are computed when it runs.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from skipscope._data import forward
from skipscope._errors import SkipscopeError
from skipscope._numbers import short, times
from skipscope._progress import track
from skipscope._public_call import public_call
from skipscope._result import Result, Table
from skipscope._untouched import random_state_kept, untouched

# Seed, layer sizes and input of the lecture.
SEED = 123
LAYER_SIZES = (3, 3, 3, 3, 3, 1)
SAMPLE_INPUT = ((1.0, 0.0, -1.0),)


# --- the lecture's names ---


class GELU(nn.Module):
    """The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415): ``x/2 (1 + tanh(...))``.

    Example:
        >>> GELU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, for any shape."""
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class ExampleDeepNeuralNetwork(nn.Module):
    """Layers of Linear and GELU; with shortcuts, ``x + layer(x)`` wherever the shapes agree.

    Args:
        layer_sizes: number of input features, then of output features of each layer; at least two sizes.
        use_shortcut: whether to add the shortcuts. Both networks have the same parameters, drawn in the same
            order.

    Example:
        >>> model = ExampleDeepNeuralNetwork([3, 3, 1], use_shortcut=True)
        >>> [name for name, _ in model.named_parameters()][0]
        'layers.0.0.weight'
    """

    def __init__(self, layer_sizes: Sequence[int], use_shortcut: bool):
        super().__init__()
        self.use_shortcut = use_shortcut
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), GELU()) for a, b in pairwise(layer_sizes))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, layer_sizes[0]]`` -> ``[n, layer_sizes[-1]]``."""
        for layer in self.layers:
            layer_output = layer(x)
            x = x + layer_output if self.use_shortcut and x.shape == layer_output.shape else layer_output
        return x


@public_call("print_gradients")
def print_gradients(model: nn.Module, x: Tensor) -> None:
    """Print each weight's mean absolute gradient as in the lecture, for the MSE loss with target 0.

    The model's ``.grad`` stays unchanged, so a second call prints the same numbers. Local.

    Raises:
        SkipscopeError: the model does not take ``x``, or its output is not one tensor with a gradient.

    Example:
        >>> model = ExampleDeepNeuralNetwork([3, 1], use_shortcut=False)
        >>> print_gradients(model, torch.zeros(1, 3))
        layers.0.0.weight has gradient mean of 0.0
    """
    with untouched(model, operation="print_gradients"):
        for name, mean in _backward(model, x).gradient_means.items():
            print(_line(name, mean))


def _line(name: str, mean: float) -> str:
    return f"{name} has gradient mean of {mean}"


class _Backward(NamedTuple):
    gradient_means: dict[str, float]
    loss: float


def _backward(model: nn.Module, x: Tensor) -> _Backward:
    """Run one backward pass as in the lecture; the gradients stay in ``.grad``."""
    output = forward(model, (x, None), "print_gradients")
    if not isinstance(output, Tensor) or not output.requires_grad:
        raise SkipscopeError(
            "print_gradients",
            "the model's output has no gradient",
            expected="a tensor that requires grad",
            got=type(output).__name__,
            cure="skipscope.gradient_flow(model, data, loss) takes any output and loss",
        )
    loss = nn.functional.mse_loss(output, torch.zeros_like(output))
    loss.backward()
    weights = [(n, p.grad) for n, p in model.named_parameters() if "weight" in n and p.grad is not None]
    return _Backward(
        {name: gradient.to_dense().abs().mean().item() for name, gradient in weights}, loss.item()
    )


# --- the experiment and what it shows ---


@dataclass(frozen=True, eq=False)
class Growth:
    """One number of the experiment, without and with shortcuts.

    Attributes:
        without: the number without shortcuts.
        with_shortcuts: the number with shortcuts.

    Example:
        >>> Growth(without=0.5, with_shortcuts=2.0).factor
        4.0
    """

    without: float
    with_shortcuts: float

    @property
    def factor(self) -> float:
        """The ratio of the number with shortcuts to that without."""
        return self.with_shortcuts / self.without


@dataclass(frozen=True, eq=False)
class BookExperiment(Result):
    """The lecture's experiment on its own seed and on many other seeds.

    Attributes:
        layers: names of the weights, from the first layer to the last.
        gradient_means: mean absolute gradient of each weight on the lecture's seed.
        loss: loss on the lecture's seed.
        means_without: ``[seeds, layers]``, mean absolute gradients on seeds 0, 1, ..., without shortcuts.
        means_with: ``[seeds, layers]``, mean absolute gradients on the same seeds with shortcuts.

    Example:
        >>> result = experiment(seeds=2)
        >>> result.layers[0], result.means_without.shape
        ('layers.0.0.weight', (2, 5))
    """

    layers: tuple[str, ...]
    gradient_means: tuple[Growth, ...]
    loss: Growth
    means_without: np.ndarray
    means_with: np.ndarray

    @property
    def first_over_last(self) -> Growth:
        """First layer's gradient over the last layer's on the lecture's seed; the loss's scale cancels."""
        first, last = self.gradient_means[0], self.gradient_means[-1]
        return Growth(first.without / last.without, first.with_shortcuts / last.with_shortcuts)

    @property
    def median_first_over_last(self) -> Growth:
        """Median over the seeds of the first layer's gradient over the last layer's."""
        return Growth(*(float(np.median(_flow(means))) for means in (self.means_without, self.means_with)))

    @property
    def share_better(self) -> float:
        """Share of the seeds on which shortcuts raise the first layer's gradient over the last layer's."""
        return float(np.mean(_flow(self.means_with) > _flow(self.means_without)))

    @property
    def share_ever_smaller(self) -> Growth:
        """Share of the seeds on which each layer's gradient is smaller than that of the next layer."""
        return Growth(*(float(np.mean(_ever_smaller(m))) for m in (self.means_without, self.means_with)))

    def table(self) -> Table:
        """A table with one row for each layer on the lecture's seed; the notes explain it."""
        rows = [
            [name, mean.without, mean.with_shortcuts, times(mean.factor)]
            for name, mean in zip(self.layers, self.gradient_means)
        ]
        title = "Mean absolute gradient of each weight, lecture's seed"
        return Table(title, ["weight", "without", "with shortcuts", "growth"], rows, self._sentences())

    def __str__(self) -> str:
        parts = ["The lecture's experiment\n========================", "Without shortcuts:"]
        parts.append("\n".join(map(_line, self.layers, (mean.without for mean in self.gradient_means))))
        parts.append("With shortcuts:")
        parts.append(
            "\n".join(map(_line, self.layers, (mean.with_shortcuts for mean in self.gradient_means)))
        )
        parts.append("What it shows, and what it does not\n-----------------------------------")
        growth, one_seed, *many_seeds = self._sentences()
        parts += [self._growth_rows(), textwrap.fill(growth, 78), textwrap.fill(one_seed, 78)]
        parts += [self._seed_rows(), *(textwrap.fill(sentence, 78) for sentence in many_seeds)]
        return "\n\n".join(parts)

    def _growth_rows(self) -> str:
        rows = {
            "gradient of the first layer": self.gradient_means[0],
            "gradient of the last layer (no shortcut)": self.gradient_means[-1],
            "flow: first over last": self.first_over_last,
            "loss": self.loss,
        }
        return "\n".join(
            [_row(f"seed {SEED}, the lecture's", "without", "with", "growth")]
            + [
                _row(f"  {name}", short(row.without), short(row.with_shortcuts), times(row.factor))
                for name, row in rows.items()
            ]
        )

    def _seed_rows(self) -> str:
        median, smaller = self.median_first_over_last, self.share_ever_smaller
        flow = short(median.without), short(median.with_shortcuts), times(median.factor)
        return "\n".join(
            [
                _row(f"seeds 0 to {len(self.means_with) - 1}", "without", "with", "growth"),
                _row("  flow: first over last, median", *flow),
                _row(
                    "  ever smaller on the way back",
                    f"{smaller.without:.1%}",
                    f"{smaller.with_shortcuts:.1%}",
                ),
            ]
        )

    def _sentences(self) -> list[str]:
        first, last, flow = self.gradient_means[0], self.gradient_means[-1], self.first_over_last
        ever_smaller = _ever_smaller(np.array([[mean.without for mean in self.gradient_means]]))[0]
        return [
            (
                f"The first layer's gradient grows {_fold(first)}. But the last layer, which has no shortcut"
                f" ({LAYER_SIZES[-2]} -> {LAYER_SIZES[-1]}), grows {_fold(last)} too, because the loss goes"
                f" from {short(self.loss.without)} to {short(self.loss.with_shortcuts)}: the network's"
                " numbers are larger, and so is the loss's own scale. What the shortcuts did to the flow is"
                f" the rest, first over last: {short(flow.without)} -> {short(flow.with_shortcuts)},"
                f" {_fold(flow)}."
            ),
            "One seed is one draw of the weights. Many show what is usual:",
            (
                f"Shortcuts raise first over last in {self.share_better:.1%} of the seeds. That gradients"
                " become ever smaller on the way back, layer by layer, holds without shortcuts in"
                f" {self.share_ever_smaller.without:.1%} of them; in the lecture's own seed it"
                f" {'holds' if ever_smaller else 'does not'}."
            ),
            (
                "All these are gradients of weights, which also depend on the activations they meet. The flow"
                " itself is read at the activations: skipscope flow."
            ),
        ]


def _row(name: str, *cells: str) -> str:
    return f"{name:<44}" + "".join(f"{cell:>11}" for cell in cells)


def _fold(growth: Growth) -> str:
    return times(growth.factor).removesuffix("x") + "-fold"


def _flow(means: np.ndarray) -> np.ndarray:
    return means[:, 0] / means[:, -1]


def _ever_smaller(means: np.ndarray) -> np.ndarray:
    return np.all(means[:, :-1] < means[:, 1:], axis=1)


def experiment(seeds: int = 1000) -> BookExperiment:
    """Run the lecture's experiment on its own seed and on other seeds.

    Args:
        seeds: number of other draws of the weights (seeds 0, 1, ...), each with and without shortcuts.

    Raises:
        SkipscopeError: fewer than one seed.

    Example:
        >>> result = experiment(seeds=10)
        >>> round(result.gradient_means[0].factor)
        1099
    """
    if seeds < 1:
        raise SkipscopeError("book.experiment", "no seeds", expected="1 or more", got=seeds)
    lecture = _both(SEED)
    means_without, means_with = _many_seeds(seeds)
    return BookExperiment(
        layers=tuple(lecture[0].gradient_means),
        gradient_means=tuple(map(Growth, *(run.gradient_means.values() for run in lecture))),
        loss=Growth(*(run.loss for run in lecture)),
        means_without=means_without,
        means_with=means_with,
    )


def _both(seed: int) -> tuple[_Backward, _Backward]:
    """Run one draw of the weights without and with shortcuts."""
    with random_state_kept(seed), torch.device("cpu"), torch.enable_grad():
        model, x = ExampleDeepNeuralNetwork(LAYER_SIZES, use_shortcut=False), torch.tensor(SAMPLE_INPUT)
        without = _backward(model, x)
        model.zero_grad()
        model.use_shortcut = True
        return without, _backward(model, x)


def _many_seeds(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute gradients ``[seeds, layers]`` without and with shortcuts, all draws in one batch."""
    drawn = []
    with random_state_kept(0), torch.device("cpu"):
        linears = [nn.Linear(a, b) for a, b in pairwise(LAYER_SIZES)]
        x = torch.tensor(SAMPLE_INPUT)
    with random_state_kept(0), torch.no_grad():
        for seed in track(range(seeds), "the lecture's network on other seeds"):
            torch.manual_seed(seed)
            for linear in linears:
                linear.reset_parameters()  # draws the same numbers as nn.Linear()
            drawn.append([p.clone() for linear in linears for p in linear.parameters()])
    parameters = [torch.stack(draws).requires_grad_() for draws in zip(*drawn)]
    weights, biases = parameters[::2], parameters[1::2]
    means = []
    for use_shortcut in (False, True):
        with torch.enable_grad():
            h, gelu = x.expand(seeds, *x.shape), GELU()
            for weight, bias in zip(weights, biases):
                output = gelu(torch.baddbmm(bias[:, None], h, weight.mT))
                h = h + output if use_shortcut and h.shape == output.shape else output
            gradients = torch.autograd.grad(h.square().sum(), weights)
        means.append(torch.stack([g.abs().mean((1, 2)) for g in gradients], 1).double().numpy())
    return means[0], means[1]
