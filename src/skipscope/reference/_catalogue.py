"""The reference networks by name, for the command line and the benchmarks, and the data for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope.reference._digits import digits
from skipscope.reference._english import english
from skipscope.reference._gpt import gpt
from skipscope.reference._mlp import deep_mlp
from skipscope.reference._resnet import resnet18, resnet20, resnet32, resnet56, resnet110

_ON_DIGITS: dict[str, Callable[[], nn.Module]] = {
    "plain": deep_mlp,
    "plain-he": partial(deep_mlp, init="he"),
    "shortcuts": partial(deep_mlp, shortcut="identity"),
    "scaled": partial(deep_mlp, shortcut="identity", scale="depth"),
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
}
_ON_ENGLISH: dict[str, Callable[[], nn.Module]] = {"gpt": gpt}


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Every named reference network: name -> factory without arguments.

    Example:
        >>> model = networks()["resnet20"]()
    """
    return {**_ON_DIGITS, **_ON_ENGLISH}


def data_for(name: str, n: int = 128, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of data for a named network: digits, or English.

    Args:
        name: a key of :func:`networks`.
        n: number of samples.
        seed: seed of the sampling.

    Raises:
        SkipscopeError: an unknown name.

    Example:
        >>> inputs, target = data_for("resnet20", 16)
        >>> networks()["resnet20"]()(inputs).shape
        torch.Size([16, 10])
    """
    if name not in networks():
        raise SkipscopeError("data_for", "no such network", expected=", ".join(networks()), got=name)
    return english(n, seed=seed) if name in _ON_ENGLISH else digits(n, seed=seed)
