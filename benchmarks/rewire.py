"""Stock models of other libraries, each kind of shortcut in the place of their own: does every twin train?

Each of 20 models, at a size that fits two cores, times each kind of ``skipscope.nn.registry()``: the twin of ``rewire`` takes
five steps. *trained*: its losses are finite, every new weight has a gradient and each step moved the weights. *refused*: a
``SkipscopeError`` said why not, before the first step. Anything else is *wrong*, of which there must be none. Models whose library
is not installed are left out.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipscope._errors import SkipscopeError
from skipscope.nn import registry
from skipscope.shortcuts import find_shortcuts, rewirable, rewire

STEPS = 5
Made = tuple[nn.Module, Any]


def _images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 32, 32)


def _timm(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, num_classes=5, **options), _images()

    return make


def _mixer(block: str = "MixerBlock", norm: str | None = None) -> Callable[[], Made]:
    def make() -> Made:
        from timm.models import mlp_mixer

        own = {"norm_layer": getattr(mlp_mixer, norm), "mlp_ratio": 4} if norm else {}
        layer = getattr(mlp_mixer, block)
        small = {"img_size": 32, "patch_size": 8, "num_blocks": 3, "embed_dim": 32, "num_classes": 5}
        return mlp_mixer.MlpMixer(block_layer=layer, **small, **own), _images()

    return make


def _torchvision(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision import models

        return getattr(models, name)(num_classes=5, **options), _images()

    return make


def _transformers(name: str, **config: Any) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        settings = {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        }
        settings |= {"attn_implementation": "eager", "pad_token_id": 0}
        made = getattr(transformers, f"{name}Config")(**settings | config)
        if name == "ViT":
            return transformers.ViTModel(made), _images()
        return getattr(transformers, f"{name}Model")(made), {"input_ids": torch.randint(1, 50, (3, 8))} | (
            {"decoder_input_ids": torch.randint(1, 50, (3, 6))} if name == "T5" else {}
        )

    return make


def models() -> dict[str, Callable[[], Made]]:
    """Name -> what makes the model and its inputs."""
    small_vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    made = {
        "timm/resnet10t": _timm("resnet10t"),
        "timm/resnetv2_18": _timm("resnetv2_18", layers=(1, 1, 1, 1)),
        "timm/vit": _timm("vit_tiny_patch16_224", **small_vit),
        "timm/deit3": _timm("deit3_small_patch16_224", **small_vit),
        "timm/convnext": _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 16, 32, 32)),
        "timm/mixer": _mixer(),
        "timm/resmlp": _mixer("ResBlock", "Affine"),
        "timm/regnetx_002": _timm("regnetx_002"),
        "timm/swin": _timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)
        ),
        "torchvision/resnet18": _torchvision("resnet18"),
        "torchvision/mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
        "torchvision/vit": _torchvision(
            "VisionTransformer", image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=48
        ),
        "transformers/gpt2": _transformers("GPT2", n_embd=32, n_layer=2, n_head=2, n_positions=16),
        "transformers/bert": _transformers("Bert"),
        "transformers/llama": _transformers("Llama"),
        "transformers/qwen3": _transformers("Qwen3", head_dim=16, num_key_value_heads=2),
        "transformers/gemma2": _transformers("Gemma2", head_dim=16, num_key_value_heads=2),
        "transformers/gpt_neox": _transformers("GPTNeoX"),
        "transformers/t5": _transformers("T5", d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2),
        "transformers/vit": _transformers("ViT", image_size=32, patch_size=8),
    }  # fmt: skip
    return {name: make for name, make in made.items() if importlib.util.find_spec(name.partition("/")[0])}


def _output(model: nn.Module, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out[0]


def outcome(model: nn.Module, inputs: Any, found: Any, kind: str) -> tuple[str, str]:
    """``("trained" | "refused" | "wrong", why)``."""
    try:
        twin = rewire(model, found, kind=kind, inputs=inputs).train()
    except SkipscopeError as error:
        return "refused", f"{error.problem}: {error.got}"
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"[:300]
    optimizer = torch.optim.SGD(twin.parameters(), 1e-3)
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (_output(twin, inputs).float() - 0.5).square().mean()
            loss.backward()
            before = [p.detach().clone() for p in twin.parameters()]
            optimizer.step()
            if not torch.isfinite(loss):
                return "wrong", f"a loss of {float(loss.detach())}"
            if all(torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True)):
                return "wrong", "a step moved no weight"
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"[:300]
    without = [
        name for name, p in twin.named_parameters() if name.startswith("shortcuts.") and p.grad is None
    ]
    return ("wrong", f"no gradient: {without[0]}") if without else ("trained", "")


def figures() -> list[dict[str, Any]]:
    rows = []
    for name, make in models().items():
        torch.manual_seed(0)
        model, inputs = make()
        found = rewirable(find_shortcuts(model, inputs))
        outcomes = {kind: outcome(model, inputs, found, kind) for kind in registry()}
        counts = Counter(state for state, _ in outcomes.values())
        rows.append({
            "name": f"{name}: {len(found)} sums", "value": counts["trained"], "unit": f"of {len(outcomes)} kinds train",
            "detail": {
                "refused": {kind: why for kind, (state, why) in outcomes.items() if state == "refused"},
                "wrong": {kind: why for kind, (state, why) in outcomes.items() if state == "wrong"},
            },
        })  # fmt: skip
        print(rows[-1]["name"], dict(counts), rows[-1]["detail"]["wrong"], flush=True)
    wrong = sum(len(row["detail"]["wrong"]) for row in rows)
    trained = sum(row["value"] for row in rows)
    return [
        {
            "name": "twins that train",
            "value": trained,
            "unit": f"of {len(rows)} models x {len(registry())} kinds",
        },
        {"name": "neither trained nor refused in words", "value": wrong, "unit": "twins", "aim": 0},
        *rows,
    ]
