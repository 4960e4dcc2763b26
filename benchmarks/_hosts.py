"""Stock models, as their libraries initialise them: what must never be called anything but healthy.

``python -m benchmarks._hosts label [FILE] [STEPS]`` trains each for a few steps, those that have not learnt yet; its loss
on held-out data of its own kind tells, at a size that fits two cores, before any verdict is run, and what came out is
kept in ``results/host_labels.json``. Libraries are imported when a host is built; ``available()`` says which are missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LABELS = Path(__file__).parent / "results" / "host_labels.json"
# Half of the hosts are drawn as held out, before the first rule of the verdict is set.
SEED = 13
STEPS, BATCH, BATCHES = 30, 16, 12
# Those that torchvision describes to the compiler as soon as it is imported.
VISION_OPERATORS = ("nms", "qnms")
_declared: torch.library.Library | None = None
# How these are trained for their label, where it is not as the others of their kind: batch norms over a last
# map of one pixel need more of them, AlexNet's last map must hold one, and both it and VGG take a lower rate.
TRAINED: dict[str, dict[str, Any]] = {
    "timm/hardcorenas_a": {"small": 64},
    "timm/lcnet_050": {"small": 64},
    "timm/mobilenetv3_small_100": {"small": 64},
    "timm/vgg11_bn": {"rate": 1e-4},
    "torchvision/vgg11_bn": {"rate": 1e-4},
    "torchvision/squeezenet1_1": {"small": 64, "rate": 3e-4},
    "torchvision/alexnet": {"small": 64, "rate": 1e-4},
}
LEARNT = 0.75  # of the loss at the start, on data that were not trained on


@dataclass(frozen=True)
class Host:
    """One stock model.

    Attributes:
        name: ``library/model``.
        library: what must be installed.
        make: ``make(classes, size)`` builds it anew.
        kind: ``"image"``, ``"causal"``, ``"masked"``, ``"seq2seq"``, ``"tokens"`` (classified), ``"series"``
            (classified) or ``"vector"``.
        native: the size it was made for: pixels a side, tokens, or steps.
        small: the size at which it is trained for its label.
        sizes: at which it is measured.
        rate: of AdamW, for its label.
    """

    name: str
    library: str
    make: Callable[[int, int], nn.Module]
    kind: str
    native: int
    small: int
    sizes: tuple[int, ...]
    rate: float = 1e-3


def _declare_vision_operators() -> None:
    """Let a torchvision without its C++ operators be imported: models that classify call none of them."""
    global _declared
    if _declared is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in VISION_OPERATORS:
        # Compiled operators that are there already are kept.
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    _declared = library


# --- where hosts come from ---


def _timm(model: str, native: int = 224, small: int = 32, fixed: bool = False, sizes: Any = None, rate: float = 1e-3) -> Host:  # fmt: skip
    def make(classes: int, size: int) -> nn.Module:
        _declare_vision_operators()
        import timm

        more = {"img_size": size} if fixed else {}
        return timm.create_model(model, pretrained=False, num_classes=classes, **more)

    sizes = sizes or (native // 2, native, 2 * native)
    return Host(f"timm/{model}", "timm", make, "image", native, small, sizes, rate)


def _torchvision(model: str, native: int = 224, small: int = 32, sizes: Any = None, rate: float = 1e-3, **more: Any) -> Host:  # fmt: skip
    def make(classes: int, size: int) -> nn.Module:
        _declare_vision_operators()
        import torchvision

        own = {"image_size": size} if model.startswith("vit") else {}
        return torchvision.models.get_model(model, weights=None, num_classes=classes, **more, **own)

    sizes = sizes or (native // 2, native, 2 * native)
    return Host(f"torchvision/{model}", "torchvision", make, "image", native, small, sizes, rate)


def _hf(name: str, head: str, config: str, kind: str, native: int = 64, rate: float = 1e-3, **options: Any) -> Host:  # fmt: skip
    def make(classes: int, size: int) -> nn.Module:
        _declare_vision_operators()
        import transformers

        made = dict(options)
        if kind == "tokens" or kind == "image":
            made["num_labels"] = classes
        if kind == "image":
            made["image_size"] = size
        return getattr(transformers, head)(getattr(transformers, config)(**made))

    sizes = (native // 2, native, 2 * native)
    return Host(f"transformers/{name}", "transformers", make, kind, native, native // 2, sizes, rate)


# --- hosts of our own, each written as its paper has it ---


class _LoRA(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


def _lora(classes: int, size: int) -> nn.Module:
    layers = [q for i in range(4) for q in (_LoRA(nn.Linear(size if i == 0 else 64, 64)), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, classes))


class _ReZero(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.branch(x)


def _rezero(classes: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 64), *[_ReZero(64) for _ in range(16)], nn.Linear(64, classes))


class _AdaLNZero(nn.Module):
    """DiT's block: shift, scale and gate from a condition, all zero at the start (Peebles & Xie 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class _DiT(nn.Module):
    def __init__(self, classes: int, size: int, width: int = 64, depth: int = 6):
        super().__init__()
        self.stem, self.condition = nn.Linear(size, width), nn.Linear(size, width)
        self.blocks = nn.ModuleList([_AdaLNZero(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        c, x = self.condition(x), self.stem(x)
        for block in self.blocks:
            x = block(x, c)
        return self.head(self.norm(x))


class _Recurrent(nn.Module):
    """A stock recurrent network over rows of an image, read at its last step."""

    def __init__(self, kind: type[nn.Module], classes: int, size: int, layers: int = 1, **more: Any):
        super().__init__()
        self.net = kind(8, 64, num_layers=layers, batch_first=True, **more)
        self.head = nn.Linear(64 * (2 if more.get("bidirectional") else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0][:, -1])


class _EachStep(nn.Module):
    """A recurrent language model: a loss at each step."""

    def __init__(self, kind: type[nn.Module], vocabulary: int = 256):
        super().__init__()
        self.table, self.net = nn.Embedding(vocabulary, 64), kind(64, 64, batch_first=True)
        self.head = nn.Linear(64, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.net(self.table(ids))[0]).transpose(1, 2)


class _Experts(nn.Module):
    """A mixture of which one expert is never chosen."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.stem = nn.Linear(size, 64)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(4)])  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + sum(self.experts[i](x) for i in (1, 2, 3)))


def _mlp(classes: int, size: int) -> nn.Module:
    layers = [q for i in range(3) for q in (nn.Linear(size if i == 0 else 64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, classes))


def _mlp_norm(classes: int, size: int) -> nn.Module:
    layers = [q for i in range(6) for q in (nn.Linear(size if i == 0 else 64, 64), nn.BatchNorm1d(64), nn.ReLU())]  # fmt: skip
    return nn.Sequential(*layers, nn.Linear(64, classes))


def _cnn(classes: int, size: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))


def _encoder(classes: int, size: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(8, 64), nn.TransformerEncoder(layer, 4), _Mean(), nn.Linear(64, classes))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _own(name: str, make: Callable[[int, int], nn.Module], kind: str, native: int, sizes: Any = None, rate: float = 1e-3) -> Host:  # fmt: skip
    return Host(f"torch/{name}", "torch", make, kind, native, native, sizes or (native,), rate)


def _reference(name: str, make: Callable[..., nn.Module], kind: str, native: int, sizes: Any) -> Host:
    def build(classes: int, size: int) -> nn.Module:
        return make(classes=classes) if kind == "image1" else make()

    return Host(f"skipscope/{name}", "skipscope", build, kind, native, native, sizes)


@functools.cache
def hosts() -> tuple[Host, ...]:
    """All of them."""
    from skipscope import reference

    timm = [
        *(_timm(m) for m in (
            "resnet18", "resnet26", "resnet50", "resnext26ts", "regnetx_002", "regnety_002", "convnext_atto",
            "convnextv2_atto", "mobilenetv3_small_100", "mobilenetv2_050", "efficientnet_b0", "densenet121",
            "poolformer_s12", "repvgg_a0", "ghostnet_100", "pvt_v2_b0", "rexnet_100", "tinynet_e", "seresnet18",
            "vgg11_bn", "res2net50_26w_4s", "edgenext_xx_small", "hardcorenas_a", "lcnet_050", "xception41",
        )),
        *(_timm(m, small=32, fixed=True) for m in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch32_224", "cait_xxs24_224")),
        *(_timm(m, small=32, fixed=True, sizes=(112, 224)) for m in ("mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224")),
        # Its stages must halve seven times.
        _timm("dla34", sizes=(224, 448)), _timm("xcit_nano_12_p16_224", small=32), _timm("swin_tiny_patch4_window7_224", small=56, fixed=True, sizes=(112, 224)),
    ]  # fmt: skip
    vision = [
        _torchvision(m) for m in (
            "resnet18", "resnet34", "vgg11_bn", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
            "regnet_y_400mf", "densenet121", "efficientnet_b0", "convnext_tiny",
        )
    ] + [_torchvision("swin_t", sizes=(112, 224)), _torchvision("googlenet", aux_logits=False, init_weights=True),
         _torchvision("squeezenet1_1", sizes=(112, 224, 448)), _torchvision("alexnet", sizes=(112, 224, 448), rate=3e-4)]  # fmt: skip
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 256}
    gated = small | {"intermediate_size": 128, "num_key_value_heads": 2}
    bert = small | {"intermediate_size": 128}
    hf = [
        _hf("llama-64x4", "LlamaForCausalLM", "LlamaConfig", "causal", **gated),
        _hf("llama-128x8", "LlamaForCausalLM", "LlamaConfig", "causal", **gated | {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 256}),
        _hf("llama-256x8", "LlamaForCausalLM", "LlamaConfig", "causal", **gated | {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512}),
        _hf("mistral", "MistralForCausalLM", "MistralConfig", "causal", **gated),
        _hf("qwen2", "Qwen2ForCausalLM", "Qwen2Config", "causal", **gated),
        _hf("qwen3", "Qwen3ForCausalLM", "Qwen3Config", "causal", head_dim=16, **gated),
        _hf("gemma", "GemmaForCausalLM", "GemmaConfig", "causal", head_dim=16, **gated),
        _hf("phi", "PhiForCausalLM", "PhiConfig", "causal", **bert),
        _hf("mixtral", "MixtralForCausalLM", "MixtralConfig", "causal", num_local_experts=4, **gated),
        _hf("qwen2-moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", "causal", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64, **gated),
        _hf("gpt2", "GPT2LMHeadModel", "GPT2Config", "causal", n_embd=128, n_layer=8, n_head=4, vocab_size=256),
        _hf("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", "causal", **bert),
        _hf("opt", "OPTForCausalLM", "OPTConfig", "causal", ffn_dim=128, word_embed_proj_dim=64, **small),
        _hf("bloom", "BloomForCausalLM", "BloomConfig", "causal", hidden_size=64, n_layer=4, n_head=4, vocab_size=256),
        _hf("mamba", "MambaForCausalLM", "MambaConfig", "causal", hidden_size=64, num_hidden_layers=4, vocab_size=256, native=32),
        _hf("bert-mlm", "BertForMaskedLM", "BertConfig", "masked", **bert),
        _hf("bert-classes", "BertForSequenceClassification", "BertConfig", "tokens", rate=3e-4, **bert),
        _hf("roberta", "RobertaForMaskedLM", "RobertaConfig", "masked", max_position_embeddings=256, **bert),
        _hf("albert", "AlbertForMaskedLM", "AlbertConfig", "masked", embedding_size=32, **bert),
        _hf("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", "masked", dim=64, n_layers=4, n_heads=4, hidden_dim=128, vocab_size=256),
        _hf("electra", "ElectraForMaskedLM", "ElectraConfig", "masked", embedding_size=64, **bert),
        _hf("t5", "T5ForConditionalGeneration", "T5Config", "seq2seq", d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, vocab_size=256, decoder_start_token_id=0),
        _hf("bart", "BartForConditionalGeneration", "BartConfig", "seq2seq", d_model=64, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=256, max_position_embeddings=256),
    ]  # fmt: skip
    own = [
        _own("lora", _lora, "vector", 64), _own("rezero", _rezero, "vector", 64), _own("adaln-zero", _DiT, "vector", 64),
        _own("experts, one unused", _Experts, "vector", 64), _own("mlp", _mlp, "vector", 64), _own("mlp-batchnorm", _mlp_norm, "vector", 64),
        _own("cnn with average pools", _cnn, "image", 32, (16, 32, 64), rate=3e-3), _own("transformer-encoder", _encoder, "series", 8, (8, 16), rate=3e-4),
        _own("lstm, last step", lambda c, s: _Recurrent(nn.LSTM, c, s), "series", 8, (8, 16)),
        _own("gru, last step", lambda c, s: _Recurrent(nn.GRU, c, s), "series", 8, (8, 16)),
        _own("rnn, last step", lambda c, s: _Recurrent(nn.RNN, c, s), "series", 8, (8, 16)),
        _own("lstm of two layers, both ways", lambda c, s: _Recurrent(nn.LSTM, c, s, 2, bidirectional=True), "series", 8, (8, 16)),
        _own("lstm, each step", lambda c, s: _EachStep(nn.LSTM), "causal-ids", 64, (32, 64, 128), rate=3e-3),
        _own("gru, each step", lambda c, s: _EachStep(nn.GRU), "causal-ids", 64, (32, 64, 128), rate=3e-3),
    ]  # fmt: skip
    ours = [
        _reference(n, getattr(reference, n), "image1", 16, (16, 32, 64)) for n in ("resnet20", "resnet56", "resnet110")
    ] + [
        Host("skipscope/deep_mlp with shortcuts", "skipscope", lambda c, s: reference.deep_mlp(shortcut="identity", scale="depth", classes=c), "vector", 64, 64, (64,)),
        Host("skipscope/gpt", "skipscope", lambda c, s: reference.gpt(context=max(s, 64)), "causal-ids", 64, 32, (32, 64, 128)),
    ]  # fmt: skip
    return (*timm, *vision, *hf, *own, *ours)


def held_out() -> tuple[str, ...]:
    """Half of the hosts of each library, drawn before the first rule was set; run once."""
    names: list[str] = []
    for library in ("timm", "torchvision", "transformers", "torch", "skipscope"):
        of = sorted(h.name for h in hosts() if h.library == library)
        random.Random(f"{SEED} {library}").shuffle(of)
        names += of[: len(of) // 2]
    return tuple(sorted(names))


def fingerprint() -> str:
    """SHA-256 of the list of held-out hosts."""
    return hashlib.sha256("\n".join(held_out()).encode()).hexdigest()


def available() -> dict[str, bool]:
    """Which libraries can be imported here."""
    return {name: importlib.util.find_spec(name) is not None for name in sorted({h.library for h in hosts()})}


# --- data ---


def class_counts(host: Host) -> tuple[int, ...]:
    """The numbers of classes that a host is measured with; a language model has its vocabulary alone."""
    return (10,) if host.kind in {"causal", "causal-ids", "masked", "seq2seq"} else (2, 10, 100, 1000)


def batch(host: Host, n: int, classes: int, size: int, *, split: str = "train", seed: int = 0) -> Any:
    """A batch of real data of the host's kind: digits as images, rows or vectors; English as tokens.

    With more than ten classes the label is still the digit: the others do not occur.
    """
    from skipscope import reference

    if host.kind in {"image", "image1", "series", "vector"}:
        x, y = reference.digits(n, seed=seed, split=split, image=True)
        y = y % classes
        if host.kind.startswith("image"):
            x = nn.functional.interpolate(x.view(-1, 1, 8, 8), size=(size, size), mode="bilinear")
            x = x.expand(-1, 3, -1, -1).contiguous() if host.kind == "image" else x
            return {"pixel_values": x, "labels": y} if host.library == "transformers" else (x, y)
        x = x.view(-1, 8, 8)
        return (x.repeat(1, size // 8, 1) if host.kind == "series" else x.flatten(1), y)
    text, _ = reference.english(n, context=size, seed=2 * seed + (split == "test"))
    if host.kind == "causal-ids":
        x, y = reference.english(n, context=size, seed=2 * seed + (split == "test"))
        return x, y
    if host.kind == "causal":
        return {"input_ids": text, "labels": text}
    if host.kind == "tokens":
        # Which half of a passage holds more letters "e".
        half = size // 2
        e = (text == ord("e")).float()
        label = (e[:, :half].sum(1) > e[:, half:].sum(1)).long() % classes
        return {"input_ids": text, "labels": label}
    if host.kind == "masked":
        draw = torch.Generator().manual_seed(seed)
        hidden = torch.rand(text.shape, generator=draw) < 0.2
        return {
            "input_ids": text.masked_fill(hidden, 3),
            "labels": torch.where(hidden, text, torch.full_like(text, -100)),
        }
    return {"input_ids": text, "labels": text}  # seq2seq: copy


def loss_of(host: Host) -> Callable[..., Tensor] | None:
    """None where the model brings its loss."""
    return None if host.library == "transformers" else nn.functional.cross_entropy


def value_of(host: Host, model: nn.Module, data: Any) -> Tensor:
    """The loss on a batch."""
    return (
        model(**data).loss if isinstance(data, dict) else nn.functional.cross_entropy(model(data[0]), data[1])
    )


# --- labels, by training alone ---


def train(host: Host, steps: int = STEPS) -> dict:
    """Its loss on held-out data before and after a few steps of AdamW with the usual warm-up and clipping."""
    torch.manual_seed(0)
    start, host = time.perf_counter(), replace(host, **TRAINED.get(host.name, {}))
    classes = 2 if host.kind == "tokens" else 10
    model = host.make(classes, host.small)
    # A longer run sees more data, each batch four times.
    batches = [batch(host, BATCH, classes, host.small, seed=i) for i in range(max(BATCHES, steps // 4))]
    test = batch(host, 64, classes, host.small, split="test", seed=99)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=host.rate, weight_decay=0.01)

    def held_out_loss() -> float:
        # Batch statistics, as in training: running ones are not ready after so few steps.
        with torch.no_grad():
            return float(value_of(host, model, test))

    model.train()
    before, seen = held_out_loss(), []
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = host.rate * min(1.0, (t + 1) / 5)
        optimizer.zero_grad()
        value = value_of(host, model, batches[t % len(batches)])
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        seen.append(float(value.detach()))
    after = held_out_loss()
    learnt, end = math.isfinite(after) and after < LEARNT * before, sum(seen[-5:]) / 5
    row = {
        "name": host.name, "before": before, "after": after, "train": [seen[0], end], "learns": learnt,
        "steps": steps, "size": host.small, "rate": host.rate, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    return row if learnt else row | {"why": _why(row)}


def _why(row: dict) -> str:
    """Why a host has not learnt: by its loss on what it was trained on."""
    begin, end = row["train"]
    if end < LEARNT * begin:
        return (
            f"its loss falls from {begin:.2f} to {end:.2f} in {row['steps']} steps, on held-out data not yet"
        )
    return f"its loss is {end:.2f} after {row['steps']} steps, {begin:.2f} before: too few for it"


def label(path: Path = LABELS, steps: int = STEPS) -> None:
    """Train every host that can be built here; what is there already is kept."""
    torch.set_num_threads(1)
    rows = json.loads(path.read_text())["hosts"] if path.exists() else []
    done = {row["name"] for row in rows if row.get("learns")}
    installed = available()
    # The cheap ones first, as far as known.
    known = {row["name"]: row.get("seconds", 60.0) for row in rows}
    for host in sorted(hosts(), key=lambda h: (known.get(h.name, 60.0), h.kind == "image")):
        if host.name in done:
            continue
        rows = [row for row in rows if row["name"] != host.name]
        if not installed[host.library]:
            rows.append({"name": host.name, "learns": None, "why": f"{host.library} is not installed"})
            continue
        try:
            rows.append(train(host, steps))
        except Exception as error:
            rows.append(
                {"name": host.name, "learns": None, "why": f"{type(error).__name__}: {str(error)[:200]}"}
            )
        print({k: v for k, v in rows[-1].items() if k not in {"steps", "size"}}, flush=True)
        content = {"torch": torch.__version__, "held_out": fingerprint(), "seed": SEED, "hosts": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__" and sys.argv[1:2] == ["label"]:
    label(*map(Path, sys.argv[2:3]), *map(int, sys.argv[3:4]))
