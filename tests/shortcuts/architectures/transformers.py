"""Transformers, and what is built like them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._blocks import Attention, mlp
from ._cases import case, features, images, seq, sequences, tokens
from .convolutional import conv


class RMSNorm(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class HandLayerNorm(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class SwiGLU(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One transformer layer in the ways that it is written."""

    def __init__(self, form="pre", norm=nn.LayerNorm, rope=False, ff=mlp, width=8):
        super().__init__()
        self.attn, self.mlp, self.form = Attention(width, rope=rope), ff(width), form
        self.n1, self.n2, self.n3, self.n4 = (norm(width) for _ in range(4))
        self.g1, self.g2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x):
        if self.form == "pre":
            x = x + self.attn(self.n1(x))
            return x + self.mlp(self.n2(x))
        if self.form == "post":
            x = self.n1(x + self.attn(x))
            return self.n2(x + self.mlp(x))
        if self.form == "sandwich":
            x = x + self.n3(self.attn(self.n1(x)))
            return x + self.n4(self.mlp(self.n2(x)))
        if self.form == "parallel":
            return self.mlp(self.n2(x)) + self.attn(self.n1(x)) + x
        if self.form == "parallel_left":
            return x + self.attn(self.n1(x)) + self.mlp(self.n2(x))
        if self.form == "deepnorm":
            x = self.n1(1.5 * x + self.attn(x))
            return self.n2(x * 1.5 + self.mlp(x))
        x = x + self.g1 * self.attn(self.n1(x))
        return x + self.g2 * self.mlp(self.n2(x))


class GPT(nn.Module):
    def __init__(self, layers=3, learned_positions=True, **options):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8) if learned_positions else None
        self.h = nn.ModuleList([Layer(**options) for _ in range(layers)])
        self.ln, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(ids.shape[1]))
        for layer in self.h:
            x = layer(x)
        return {"logits": self.head(self.ln(x))}


case(tokens(), "gpt2", identity=6)(GPT)
case(tokens(), "gpt_hand_norm", identity=6)(lambda: GPT(norm=HandLayerNorm))
case(tokens(), "bert", identity=6)(lambda: GPT(form="post"))
case(tokens(), "gemma_sandwich", identity=6)(lambda: GPT(form="sandwich", norm=RMSNorm))
case(tokens(), "llama", identity=6)(lambda: GPT(learned_positions=False, norm=RMSNorm, rope=True, ff=SwiGLU))
case(tokens(), "neox_parallel", identity=3)(lambda: GPT(form="parallel", rope=True))
case(tokens(), "parallel_left", identity=3)(lambda: GPT(form="parallel_left"))
case(tokens(), "deepnorm", scaled=6)(lambda: GPT(form="deepnorm"))
case(tokens(), "cait_layer_scale", identity=6)(lambda: GPT(form="scale"))


class T5(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.shared, self.bias = nn.Embedding(11, 8), nn.Embedding(4, 2)
        self.encoder = nn.ModuleList(
            [nn.ModuleList([Attention(), mlp(), RMSNorm(), RMSNorm()]) for _ in range(layers)]
        )
        self.decoder = nn.ModuleList(
            [
                nn.ModuleList([Attention(), Attention(), mlp(), RMSNorm(), RMSNorm(), RMSNorm()])
                for _ in range(layers)
            ]
        )

    def forward(self, input_ids, decoder_input_ids):
        n = torch.arange(input_ids.shape[1])
        bias = self.bias((n[:, None] - n[None, :]).abs().clamp(max=3)).permute(2, 0, 1)[None]
        x = self.shared(input_ids)
        for attention, ff, n1, n2 in self.encoder:
            x = x + attention(n1(x), bias=bias)
            x = x + ff(n2(x))
        y = self.shared(decoder_input_ids)
        for own, cross, ff, n1, n2, n3 in self.decoder:
            y = y + own(n1(y), bias=bias)
            y = y + cross(n2(y), memory=x)
            y = y + ff(n3(y))
        return y


case({"input_ids": tokens(), "decoder_input_ids": (tokens() + 1) % 11}, "t5", identity=10)(T5)


class ViT(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.cls, self.position = (
            nn.Parameter(torch.zeros(1, 1, 8)),
            nn.Parameter(torch.full((1, 17, 8), 0.02)),
        )
        self.blocks, self.head = seq(*[Layer() for _ in range(layers)]), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


case(images(), "vit", identity=4)(ViT)


class SwinBlock(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.n1, self.attn, self.n2, self.mlp, self.shift = (
            nn.LayerNorm(8),
            Attention(),
            nn.LayerNorm(8),
            mlp(),
            shift,
        )
        self.table = nn.Parameter(torch.full((2, 16, 16), 0.01))

    def forward(self, x):  # [batch, 8, 8, width], windows of 4 x 4
        y = torch.roll(self.n1(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        y = self.attn(y, bias=self.table)
        y = y.view(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.n2(x))


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 8, 2, 2), seq(SwinBlock(0), SwinBlock(2))

    def forward(self, x):
        return self.blocks(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2))


case(images(), "swin", identity=4)(Swin)


class PoolFormerBlock(nn.Module):
    def __init__(self, c=4, residual_scale=False):
        super().__init__()
        self.n1, self.n2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)
        self.mlp = seq(conv(c, 2 * c, 1), nn.GELU(), conv(2 * c, c, 1))
        self.s1, self.s2 = (nn.Parameter(torch.full((c, 1, 1), 0.1)) for _ in range(2))
        self.r1, self.r2 = (nn.Parameter(torch.ones(c, 1, 1)) if residual_scale else None for _ in range(2))

    def forward(self, x):
        y = self.n1(x)
        x = (x if self.r1 is None else self.r1 * x) + self.s1 * (F.avg_pool2d(y, 3, 1, 1) - y)
        return (x if self.r2 is None else self.r2 * x) + self.s2 * self.mlp(self.n2(x))


case(images(), "poolformer", identity=4)(lambda: seq(conv(3, 4), PoolFormerBlock(), PoolFormerBlock()))
case(images(), "metaformer_scaled", scaled=4)(
    lambda: seq(conv(3, 4), PoolFormerBlock(residual_scale=True), PoolFormerBlock(residual_scale=True))
)


class MixerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = (nn.LayerNorm(8) for _ in range(2))
        self.token, self.channel = mlp(6), mlp(8)

    def forward(self, x):
        x = x + self.token(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel(self.n2(x))


case(sequences(), "mlp_mixer", identity=4)(lambda: seq(MixerBlock(), MixerBlock()))


class GatedMLP(nn.Module):
    """gMLP: u * f(v), around which goes a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm, self.inp, self.out = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.gate_norm, self.spatial = nn.LayerNorm(8), nn.Conv1d(6, 6, 1)

    def forward(self, x):
        u, v = F.gelu(self.inp(self.norm(x))).chunk(2, -1)
        return x + self.out(u * self.spatial(self.gate_norm(v)))


case(sequences(), "gmlp", identity=2)(lambda: seq(GatedMLP(), GatedMLP()))


class Conformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.f1, self.f2 = seq(nn.LayerNorm(8), mlp()), seq(nn.LayerNorm(8), mlp())
        self.norm, self.attn, self.last = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.pw1, self.dw, self.pw2 = (
            nn.Conv1d(8, 16, 1),
            nn.Conv1d(8, 8, 3, padding=1, groups=8),
            nn.Conv1d(8, 8, 1),
        )
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x):
        x = x + 0.5 * self.f1(x)
        x = x + self.attn(self.norm(x))
        x = x + self.pw2(F.silu(self.bn(self.dw(F.glu(self.pw1(x.transpose(1, 2)), 1))))).transpose(1, 2)
        x = x + 0.5 * self.f2(x)
        return self.last(x)


case(sequences(), "conformer", identity=8)(lambda: seq(Conformer(), Conformer()))


class MoE(nn.Module):
    def __init__(self, width=8, experts=3):
        super().__init__()
        self.router, self.experts = (
            nn.Linear(width, experts),
            nn.ModuleList([mlp(width) for _ in range(experts)]),
        )
        self.shared = mlp(width)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == e)
            out.index_add_(0, rows, expert(flat[rows]) * weight[rows, slot, None])
        return out.view(x.shape) + self.shared(x)


case(tokens(), "mixture_of_experts", identity=4)(lambda: GPT(2, ff=MoE))


class ValueResidual(nn.Module):
    """2410.17897: every layer's values get the first layer's added: v_l = W_l x_l + v_1."""

    def __init__(self, layers=3):
        super().__init__()
        self.attn = nn.ModuleList([Attention() for _ in range(layers)])
        self.mlp, self.norm = nn.ModuleList([mlp() for _ in range(layers)]), nn.LayerNorm(8)

    def forward(self, x):
        first = None
        for attention, ff in zip(self.attn, self.mlp):
            y, value = attention(self.norm(x), value=first, return_value=True)
            first = value if first is None else first
            x = x + y
            x = x + ff(x)
        return x


case(sequences(), "value_residual", identity=8)(ValueResidual)


class HyperConnections(nn.Module):
    """2409.19606, static: X' = H_res X + H_post F(H_pre X) on n streams."""

    def __init__(self, layers=2, n=2):
        super().__init__()
        self.f = nn.ModuleList([seq(nn.LayerNorm(8), mlp()) for _ in range(layers)])
        self.pre, self.post = (nn.ParameterList([torch.ones(n) / n for _ in range(layers)]) for _ in range(2))
        self.res = nn.ParameterList([torch.eye(n) * 0.9 + 0.1 for _ in range(layers)])
        self.n = n

    def forward(self, x):
        streams = x.unsqueeze(0).expand(self.n, *x.shape)
        for f, pre, res, post in zip(self.f, self.pre, self.res, self.post):
            y = f(torch.einsum("n,nbtd->btd", pre, streams))
            streams = torch.einsum("mn,nbtd->mbtd", res, streams) + post[:, None, None, None] * y
        return streams.sum(0)


case(sequences(), "hyper_connections", projection=2)(HyperConnections)


class DenseFormer(nn.Module):
    """2402.02622: after each block a learned weighted average of all representations so far."""

    def __init__(self, layers=3):
        super().__init__()
        self.blocks = nn.ModuleList([Layer() for _ in range(layers)])
        self.alpha = nn.ParameterList([torch.full((k + 2,), 0.3) for k in range(layers)])

    def forward(self, x):
        seen = [x]
        for block, alpha in zip(self.blocks, self.alpha):
            seen.append(block(x))
            x = sum(a * s for a, s in zip(alpha, seen))
        return x


# Two merges a block inside; outside, a first average of 2, one of 3 and one of 4 addends: 1 + 2 + 3 merges.
case(sequences(), "denseformer", identity=6, scaled=6)(DenseFormer)


class Mamba(nn.Module):
    """A selective scan written out, with the paper's own skip D."""

    def __init__(self, width=8, state=3):
        super().__init__()
        self.norm, self.inp, self.out = RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.x_proj, self.dt = nn.Linear(width, 1 + 2 * state), nn.Linear(1, width)
        self.A, self.D = (
            nn.Parameter(torch.linspace(0, 1, width * state).reshape(width, state)),
            nn.Parameter(torch.ones(width)),
        )
        self.state = state

    def mix(self, x):
        u, z = self.inp(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, B, C = self.x_proj(u).split([1, self.state, self.state], -1)
        dt = F.softplus(self.dt(dt))
        dA = torch.exp(dt[..., None] * -torch.exp(self.A))
        dBu = dt[..., None] * B[:, :, None, :] * u[..., None]
        h, ys = torch.zeros_like(dBu[:, 0]), []
        for t in range(x.shape[1]):
            h = dA[:, t] * h + dBu[:, t]
            ys.append((h * C[:, t, None, :]).sum(-1))
        y = torch.stack(ys, 1) + u * self.D
        return self.out(y * F.silu(z))

    def forward(self, x):
        return x + self.mix(self.norm(x))


case(sequences(), "mamba", identity=2, scaled=2)(lambda: seq(Mamba(), Mamba()))


class RWKV(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix_k, self.mix_r = (nn.Parameter(torch.full((width,), 0.3)) for _ in range(2))
        self.key, self.value, self.receptance = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.n1(x)
        y = self.n2(x)
        last = F.pad(y, (0, 0, 1, -1))
        k = y * self.mix_k + last * (1 - self.mix_k)
        r = y * self.mix_r + last * (1 - self.mix_r)
        return x + torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)) ** 2)


case(sequences(), "rwkv_channel_mix", identity=2)(lambda: seq(RWKV(), RWKV()))


case(sequences(), "torch_encoder", identity=4)(
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
)
case(sequences(), "torch_encoder_pre_norm", identity=2)(
    lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
)
case((sequences(), sequences().flip(0)), "torch_transformer", identity=10)(
    lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
)


class Perceiver(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
        self.first, self.cross, self.ff = nn.Linear(8, 8), Attention(), mlp()

    def forward(self, x):
        z = self.latents + self.first(x.mean(1, keepdim=True))
        z = z + self.cross(z, memory=x)
        return z + self.ff(z)


case(sequences(), "perceiver", identity=2)(Perceiver)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = seq(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, a, b):
        return torch.cat([self.body(a), self.body(b), self.body(a) - self.body(b)], -1)


case((features(), features() * 2), "siamese")(Siamese)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mu, self.log_var = seq(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = seq(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        h = self.body(x)
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum()
        return self.decoder(z), kl


case(features(), "vae")(VAE)


class LoRA(nn.Module):
    """A low-rank update of one linear map is no shortcut past another."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 2.0


case(features(), "lora")(lambda: seq(LoRA(), nn.ReLU(), LoRA()))


class GraphConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        source, target = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
        gathered = torch.zeros_like(x).index_add(0, target, self.message(x)[source])
        return F.relu(self.own(x) + gathered) + x


case(features(), "graph_conv", identity=2)(lambda: seq(GraphConv(), GraphConv()))


class DeepLinear(nn.Module):
    """1611.01186: two-layer linear shortcuts."""

    def __init__(self, layers=2):
        super().__init__()
        self.pairs = nn.ModuleList(
            [seq(nn.Linear(4, 4, False), nn.Linear(4, 4, False)) for _ in range(layers)]
        )

    def forward(self, x):
        for pair in self.pairs:
            x = x + pair(x)
        return x


case(features(3, 4), "deep_linear", identity=2)(DeepLinear)
