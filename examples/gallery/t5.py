"""
T5: shortcuts of an encoder and a decoder
=========================================

Each layer of the encoder has two shortcuts, each of the decoder three: around its attention to itself, around its
attention to the encoder, and around its feed-forward network.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class Attention(nn.Module):
    """Multi-head attention from one sequence to another."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out, self.heads = nn.Linear(width, width, bias=False), heads

    def forward(self, x: torch.Tensor, memory: torch.Tensor, causal: bool = False) -> torch.Tensor:
        """``[n, t, width]`` and ``[n, s, width]`` to ``[n, t, width]``."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a norm and around it a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, s, width]`` to the same."""
        hidden = self.norm1(x)
        x = x + self.attention(hidden, hidden)
        return x + self.mlp(self.norm2(x))


class DecoderLayer(EncoderLayer):
    """The same with attention to the encoder in between."""

    def __init__(self, width: int):
        super().__init__(width)
        self.norm3, self.cross = nn.RMSNorm(width), Attention(width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``[n, t, width]`` to the same."""
        hidden = self.norm1(x)
        x = x + self.attention(hidden, hidden, causal=True)
        x = x + self.cross(self.norm3(x), memory)
        return x + self.mlp(self.norm2(x))


class T5(nn.Module):
    """An encoder and a decoder that share their embedding."""

    def __init__(self, words: int = 32, width: int = 32, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(16, width))
        self.encoder = nn.ModuleList(EncoderLayer(width) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Token ids ``[n, s]`` and ``[n, t]`` to logits ``[n, t, words]``."""
        memory = self.embed(source) + self.places[: source.shape[1]]
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embed(target) + self.places[: target.shape[1]]
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(self.norm(x))


def next_word(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


torch.manual_seed(0)
model = T5()
source = torch.randint(1, 32, (32, 8))
reverse = source.flip(1)
shifted = F.pad(reverse[:, :-1], (1, 0))
data = (source, shifted), reverse

found = ss.find_shortcuts(model, (source, shifted))
print(len(found), "shortcuts:", ", ".join(s.name for s in found))

# %%
# The encoder and the decoder are two lines of boundaries; each is judged for itself.
flow = ss.gradient_flow(model, data, next_word)
print(flow.verdict)
flow.plot()
plt.show()

# %%
# Which shortcuts does the untrained model live by?
print(ss.importance(model, data, next_word))
