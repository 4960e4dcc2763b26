"""1,797 real images of handwritten digits, 8 x 8 pixels, included in the package.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998
(https://doi.org/10.24432/C50P49), CC BY 4.0; see LICENSE-digits.txt beside the data.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from skipscope._errors import SkipscopeError
from skipscope._validation import require_option

# The images are ordered by writer, so a random split would put the same writers into train and test.
_TRAIN = 1437


def digits(
    n: int | None = None, *, seed: int = 0, split: Literal["train", "test"] | None = None, image: bool = False
) -> tuple[Tensor, Tensor]:
    """Handwritten digits as one batch.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998 (https://doi.org/10.24432/C50P49), licensed CC BY 4.0.

    Args:
        n: number of images; None for all, in the order of the source. Fewer are sampled without replacement
            and class-balanced (counts differ by at most one), in a random order that depends on ``seed``.
        seed: seed of the sampling.
        split: ``"train"`` is the first 1,437 images, ``"test"`` the last 360; None is both.
        image: return inputs of shape ``[n, 1, 8, 8]`` instead of ``[n, 64]``.

    Returns:
        ``(inputs, target)``: float32 from 0 (paper) to 1 (ink), and int64 classes ``[n]`` from 0 to 9.

    Raises:
        SkipscopeError: ``n`` is not between 1 and the number of images, or an unknown split.

    Example:
        >>> inputs, target = digits(20)
        >>> inputs.shape, target.bincount().tolist()
        (torch.Size([20, 64]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    require_option("digits", "split", split, ("train", "test", None))
    pixels, labels = _source()
    chosen = np.arange(len(labels))[
        {"train": slice(_TRAIN), "test": slice(_TRAIN, None), None: slice(None)}[split]
    ]
    if n is not None:
        if not 0 < n <= len(chosen):
            raise SkipscopeError("digits", "no such number of images", expected=f"1 to {len(chosen)}", got=n)
        chosen = _balanced(chosen, labels, n, np.random.default_rng(seed))
    inputs = torch.from_numpy(pixels[chosen].astype(np.float32) / 16)
    return inputs.reshape(-1, 1, 8, 8) if image else inputs, torch.from_numpy(labels[chosen].astype(np.int64))


@functools.cache
def _source() -> tuple[np.ndarray, np.ndarray]:
    with files("skipscope.reference").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        return archive["images"], archive["labels"]


def _balanced(chosen: np.ndarray, labels: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """Order shuffled images so that each round has one image of every class; keep the first ``n``."""
    chosen = generator.permutation(chosen)
    round_of = np.empty(len(chosen))
    for digit in range(10):
        mine = labels[chosen] == digit
        round_of[mine] = np.arange(mine.sum())
    kept = chosen[np.argsort(round_of, kind="stable")[:n]]
    return generator.permutation(kept)
