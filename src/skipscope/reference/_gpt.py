"""A small GPT-2: Radford et al. 2019, pre-norm blocks with two shortcuts each.

Legend of shapes: B batch, T tokens, C width, H heads, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """``[B, T, C]`` -> ``[B, T, C]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(x_BTC).chunk(3, dim=-1)
        )
        y_BHTc = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_BHTc.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU in between."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """``[B, T, C]`` -> ``[B, T, C]``."""
        return self.c_proj(F.gelu(self.c_fc(x_BTC), approximate="tanh"))


class Block(nn.Module):
    """``x + attn(ln(x))``, then ``x + mlp(ln(x))``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """``[B, T, C]`` -> ``[B, T, C]``."""
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class GPT(nn.Module):
    """Embeddings, blocks, a final norm, and a head tied to the token embedding; see :func:`gpt`.

    Example:
        >>> model = GPT(layers=1, width=8, heads=2, vocab=16, context=4)
        >>> model(torch.zeros(2, 4, dtype=torch.int64)).shape
        torch.Size([2, 16, 4])
    """

    def __init__(self, layers: int, width: int, heads: int, vocab: int, context: int):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                # As in GPT-2, the last layer of a branch gets a smaller std, so that the sum of 2L branches
                # does not grow with L.
                last = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """``[B, T]`` int64 -> logits ``[B, V, T]``, with classes second as torch's cross-entropy expects."""
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTC = self.wte(ids_BT) + self.wpe(positions_T)
        for block in self.h:
            x_BTC = block(x_BTC)
        return self.lm_head(self.ln_f(x_BTC)).transpose(1, 2)


def gpt(layers: int = 4, width: int = 64, heads: int = 4, vocab: int = 256, context: int = 64) -> GPT:
    """A small GPT-2 with GPT-2's initialisation and no dropout, for :func:`english`.

    Its output is ``[B, vocab, T]``, so ``torch.nn.functional.cross_entropy(output, target)`` works directly.

    Args:
        layers: number of blocks, with two shortcuts each.
        width: width of the residual stream.
        heads: number of attention heads in each block; each has ``width / heads`` features.
        vocab: number of tokens; 256 for bytes.
        context: largest number of tokens in a passage.

    Example:
        >>> with torch.device("meta"):  # GPT-2's own sizes, without its memory
        ...     sum(p.numel() for p in gpt(12, 768, 12, vocab=50257, context=1024).parameters())
        124439808
    """
    return GPT(layers, width, heads, vocab, context)
