"""English text included in every Python: the topics of the language reference, from the module pydoc_data.

The text differs between patch releases of Python, so report ``english_text().sha256`` with any result on it.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from skipscope._errors import SkipscopeError
from skipscope._validation import require_option


@dataclass(frozen=True, eq=False)
class English:
    """A text as tokens, which are the bytes of its UTF-8 encoding.

    Attributes:
        ids: ``[length]`` int64, from 0 to 255.
        sha256: hash of the whole text, regardless of ``length``.
        vocabulary: number of possible tokens, 256.

    Example:
        >>> text = English(torch.tensor([72, 105]), sha256="")
        >>> text.decode(text.ids)
        'Hi'
    """

    ids: Tensor
    sha256: str
    vocabulary: int = 256

    def decode(self, ids: Tensor) -> str:
        """Decode token ids to text."""
        return bytes(ids.tolist()).decode("utf-8", errors="replace")


def english_text(length: int | None = None) -> English:
    """The whole text, or its first ``length`` bytes.

    Raises:
        SkipscopeError: the text is shorter than ``length``.

    Example:
        >>> text = english_text(1000)
        >>> text.ids.shape, text.vocabulary
        (torch.Size([1000]), 256)
    """
    data, digest = _source()
    if length is not None and not 0 < length <= len(data):
        raise SkipscopeError("english_text", "no such length", expected=f"1 to {len(data)} bytes", got=length)
    return English(torch.from_numpy(np.frombuffer(data[:length], np.uint8).astype(np.int64)), digest)


def english(
    n: int = 32,
    *,
    context: int = 64,
    length: int | None = None,
    split: Literal["train", "test"] | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Passages of English as one batch for next-token prediction.

    Args:
        n: number of passages, drawn at random.
        context: number of tokens in a passage.
        length: draw from the first ``length`` bytes only; None for the whole text.
        split: ``"train"`` draws from the first 80 % of these bytes, ``"test"`` from the last 20 %; None from
            all.
        seed: seed of the sampling.

    Returns:
        ``(inputs, target)``: both ``[n, context]`` int64; the target is the inputs shifted by one token.

    Raises:
        SkipscopeError: no passage of that length fits, or an unknown split.

    Example:
        >>> inputs, target = english(4, context=16)
        >>> inputs.shape, bool((inputs[:, 1:] == target[:, :-1]).all())
        (torch.Size([4, 16]), True)
    """
    require_option("english", "split", split, ("train", "test", None))
    ids = english_text(length).ids
    cut = len(ids) * 4 // 5
    ids = ids[{"train": slice(cut), "test": slice(cut, None), None: slice(None)}[split]]
    if n < 1 or not 0 < context < len(ids):
        raise SkipscopeError(
            "english",
            "no passage of that length fits",
            expected=f"n >= 1 and a context from 1 to {len(ids) - 1}",
            got=f"n={n}, context={context}",
        )
    starts = np.random.default_rng(seed).integers(0, len(ids) - context, size=n)
    windows = ids[torch.from_numpy(starts)[:, None] + torch.arange(context + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@functools.cache
def _source() -> tuple[bytes, str]:
    from pydoc_data.topics import topics

    data = "\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
    return data, hashlib.sha256(data).hexdigest()
