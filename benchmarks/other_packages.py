"""Finding and editing in other people's packages: counts against those read in their source, and whether edits are exact.

``python -m benchmarks.other_packages [NAME ...]``: a line for each model of each package that is installed (random
weights, tiny configurations); what is not installed is skipped, and the table says so. With names the other rows of the
table stay as they were. Expected counts were read in each package's source; the
column *read* says how they come about. Edits are right where a detached twin and one of strength 1 give the model's
output bit for bit, strength 0 gives that of the removed twin, and the removed twin gives another.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipscope import _data
from skipscope.shortcuts import Shortcuts, ablate, find_shortcuts

RESULTS = Path(__file__).parent / "results" / "other_packages.json"


@dataclass(frozen=True)
class Row:
    """One model of a package.

    Attributes:
        package: what is imported.
        name: of the model.
        make: ``make(package)`` builds it.
        inputs: what it is called with.
        expected: shortcuts read in its source, by kind.
        read: how they come about.
        opaque: calls that cannot be looked into, read in its source.
        passed: decoder skips that pass a block.
    """

    package: str
    name: str
    make: Callable[[Any], nn.Module]
    inputs: Callable[[], Any]
    expected: dict[str, int]
    read: str
    opaque: int = 0
    passed: int = 0


def _part(path: str, name: str) -> Any:
    return getattr(importlib.import_module(path), name)


def image(size: int, channels: int = 3, count: int = 1) -> Callable[[], Tensor]:
    return lambda: torch.randn(count, channels, size, size)


def tokens(length: int, count: int = 1) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 20, (count, length))


def graph(width: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(6, width), torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6]))


class _Stacked(nn.Module):
    """Layers one after the other, with what they all take besides; of several outputs the first goes on."""

    def __init__(self, *layers: nn.Module, before: nn.Module | None = None, after: nn.Module | None = None):
        super().__init__()
        self.layers, self.before, self.after = nn.ModuleList(layers), before, after

    def forward(self, x: Any, *others: Any) -> Any:
        x = x if self.before is None else self.before(x)
        for layer in self.layers:
            out = layer(x, *others)
            x = out[0] if isinstance(out, tuple) else out
        return x if self.after is None else self.after(x)


class _Fed(nn.Module):
    """GCNII: each layer takes the first layer's input too."""

    def __init__(self, package: Any):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(package.nn.GCN2Conv(8, 0.1, 0.5, i + 1) for i in range(3))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = start = self.first(x).relu()
        for layer in self.layers:
            x = layer(x, start, edges).relu()
        return x


class _Streams(nn.Module):
    """Three blocks on several residual streams."""

    def __init__(self, make: Any, expand: nn.Module, reduce: nn.Module):
        super().__init__()
        self.expand, self.reduce = expand, reduce
        self.layers = nn.ModuleList(
            make(dim=8, branch=nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        for layer in self.layers:
            x = layer(x)
        return self.reduce(x)


class _Integrated(nn.Module):
    """A differential equation by four Euler steps."""

    def __init__(self, solve: Any):
        super().__init__()
        self.f, self.last, self.solve = _Field(), nn.Linear(4, 2), solve

    def forward(self, x: Tensor) -> Tensor:
        times = torch.tensor([0.0, 1.0])
        return self.last(self.solve(self.f, x, times, method="euler", options={"step_size": 0.25})[-1])


class _Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class _Transformed(nn.Module):
    """What a normalising flow makes of its input."""

    def __init__(self, flow: Any, call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.flow, self.call = flow, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.flow, x)


def subnet(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))


def _freia(package: Any, block: str) -> nn.Module:
    net = _part("FrEIA.framework", "SequenceINN")(4)
    for _ in range(2):
        net.append(_part("FrEIA.modules", block), subnet_constructor=subnet)
    return _Transformed(net, lambda flow, x: flow(x)[0])


def _nflows(package: Any, coupling: bool) -> nn.Module:
    transforms = importlib.import_module("nflows.transforms")
    net = _part("nflows.nn.nets", "ResidualNet")
    if coupling:
        made = [
            transforms.AffineCouplingTransform(
                torch.tensor([1, -1] * 2), lambda i, o: net(i, o, hidden_features=8, num_blocks=2)
            )
            for _ in range(2)
        ]
    else:
        made = [transforms.MaskedAffineAutoregressiveTransform(4, 8, num_blocks=2) for _ in range(2)]
    return _Transformed(transforms.CompositeTransform(made), lambda flow, x: flow(x)[0])


def _realnvp(package: Any) -> nn.Module:
    layers = []
    for _ in range(3):
        layers.append(package.flows.AffineCouplingBlock(package.nets.MLP([1, 8, 2], init_zeros=False)))
        layers.append(package.flows.Permute(2, mode="swap"))
    return _Stacked(*layers)


def _alive(model: nn.Module) -> nn.Module:
    """The model with convolutions that keep the scale of their input; untrained, its output is a bias."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def _x(**options: Any) -> Callable[[Any], nn.Module]:
    def make(package: Any) -> nn.Module:
        layers = package.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
        return package.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers)

    return make


def _smp(name: str) -> Callable[[Any], nn.Module]:
    return lambda package: getattr(package, name)("resnet18", encoder_weights=None, classes=2)


def _vit(module: str, name: str, **options: Any) -> Callable[[Any], nn.Module]:
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "num_classes": 3,
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "mlp_dim": 16,
    }
    return lambda package: _part(f"vit_pytorch.{module}", name)(**{**sizes, **options})


def _cv(name: str) -> Callable[[Any], nn.Module]:
    return lambda package: _part("pytorchcv.model_provider", "get_model")(name, pretrained=False)


def _spandrel(module: str, name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda package: _part(f"spandrel.architectures.{module}", name)(**options)


def _diffusers(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda package: getattr(package, name)(**options)


def _language(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    sizes = {"num_tokens": 20, "dim": 16, "depth": 2, "heads": 2, "max_seq_len": 16}
    return lambda package: getattr(package, name)(**{**sizes, **options})


def _clip(package: Any) -> nn.Module:
    model = importlib.import_module("open_clip.model")
    vision = model.CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=32)
    text = model.CLIPTextCfg(context_length=8, vocab_size=20, width=16, heads=2, layers=2)
    return model.CLIP(16, vision, text)


def _on_streams(path: str) -> Callable[[Any], nn.Module]:
    def make(package: Any) -> nn.Module:
        init, expand, reduce = _part(path, "get_init_and_expand_reduce_stream_functions")(4)[:3]
        return _Streams(init, expand, reduce)

    return make


_ENCODER = {"identity": 5, "projection": 3}
_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
_MAMBA = {"d_model": 16, "n_layers": 2, "d_state": 4}
_LATENTS = {
    "num_latents": 4,
    "latent_dim": 16,
    "cross_heads": 1,
    "latent_heads": 2,
    "cross_dim_head": 8,
    "latent_dim_head": 8,
}
# Parts that a package imports only when asked.
_PARTS = {"monai": "monai.networks.nets", "torch_geometric": "torch_geometric.nn", "kornia": "kornia.contrib"}
ROWS = (
    Row(
        "segmentation_models_pytorch",
        "Unet",
        _smp("Unet"),
        image(64),
        {**_ENCODER, "concat": 4},
        "ResNet-18's 8; one skip a level",
    ),
    Row(
        "segmentation_models_pytorch",
        "UnetPlusPlus",
        _smp("UnetPlusPlus"),
        image(64),
        {**_ENCODER, "concat": 10},
        "8; each node with x_i_0 among what it joins, and of one node beside",
        passed=6,
    ),
    Row(
        "segmentation_models_pytorch",
        "FPN",
        _smp("FPN"),
        image(64),
        {"identity": 5, "projection": 6},
        "8; three lateral 1x1",
    ),
    Row(
        "segmentation_models_pytorch",
        "DeepLabV3Plus",
        _smp("DeepLabV3Plus"),
        image(64, count=2),
        _ENCODER,
        "8; the decoder's skip passes a block",
        passed=1,
    ),
    Row(
        "segmentation_models_pytorch",
        "Linknet",
        _smp("Linknet"),
        image(64),
        {"identity": 9, "projection": 3},
        "8; four sums in the decoder",
    ),
    Row(
        "segmentation_models_pytorch",
        "MAnet",
        _smp("MAnet"),
        image(64),
        {"identity": 6, "projection": 3, "concat": 4},
        "8; position attention; four skips",
    ),
    Row(
        "monai",
        "SegResNet",
        lambda p: p.networks.nets.SegResNet(2, init_filters=8, in_channels=1, out_channels=2),
        image(32, 1),
        {"identity": 15},
        "9 blocks down, 3 up, 3 skips",
    ),
    Row(
        "monai",
        "BasicUNet",
        lambda p: p.networks.nets.BasicUNet(2, 1, 2, features=(4, 4, 8, 8, 16, 4)),
        image(32, 1),
        {"concat": 4},
        "one skip a level",
    ),
    Row(
        "monai",
        "DynUNet",
        lambda p: p.networks.nets.DynUNet(
            2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 16], res_block=True
        ),
        image(32, 1),
        {"projection": 3, "concat": 2},
        "3 residual blocks; 2 skips",
    ),
    Row(
        "monai",
        "UNETR",
        lambda p: p.networks.nets.UNETR(
            1, 2, (32,) * 3, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2
        ),
        lambda: torch.randn(1, 1, 32, 32, 32),
        {"identity": 27, "projection": 5},
        "12 layers x 2; 8 residual blocks; 4 skips pass a block",
        passed=4,
    ),
    Row(
        "monai",
        "DenseNet121",
        lambda p: p.networks.nets.DenseNet121(2, 1, 2),
        image(32, 1),
        {"concat": 58},
        "58 layers",
    ),
    Row(
        "monai",
        "HighResNet",
        lambda p: p.networks.nets.HighResNet(3, 1, 2),
        lambda: torch.randn(1, 1, 8, 8, 8),
        {"identity": 9},
        "9 blocks",
    ),
    Row(
        "diffusers",
        "UNet2DModel",
        _diffusers(
            "UNet2DModel",
            sample_size=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **_UNET,
        ),
        lambda: (torch.randn(1, 3, 16, 16), torch.tensor([3])),
        {"identity": 7, "projection": 5, "concat": 4},
        "8 ResNet blocks, 4 attentions, 4 skips",
    ),
    Row(
        "diffusers",
        "FluxTransformer2DModel",
        _diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": torch.randn(1, 4, 4),
            "encoder_hidden_states": torch.randn(1, 3, 8),
            "pooled_projections": torch.randn(1, 8),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
        },
        {"identity": 10},
        "2 x 4 in double blocks, 2 single",
    ),
    Row(
        "diffusers",
        "AutoencoderKL",
        _diffusers(
            "AutoencoderKL",
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            layers_per_block=1,
        ),
        image(16),
        {"identity": 10, "projection": 2},
        "10 ResNet blocks, 2 attentions",
    ),
    Row(
        "torch_geometric",
        "GCN, jk=cat",
        lambda p: p.nn.GCN(4, 8, 3, 4, jk="cat"),
        graph(4),
        {"concat": 1},
        "the outputs of all layers",
    ),
    Row(
        "torch_geometric",
        "DeepGCN",
        lambda p: _Stacked(
            *(
                p.nn.DeepGCNLayer(p.nn.GCNConv(8, 8), nn.LayerNorm(8), nn.ReLU(), block="res+")
                for _ in range(3)
            )
        ),
        graph(8),
        {"identity": 3},
        "one a layer",
    ),
    Row(
        "torch_geometric",
        "GCNII",
        _Fed,
        graph(8),
        {"scaled": 5},
        "(1 - b) x + b W x in 3 layers; the first layer's input in 2",
    ),
    Row(
        "torch_geometric",
        "GroupAddRev",
        lambda p: _Stacked(p.nn.GroupAddRev(p.nn.GCNConv(4, 4), num_groups=2)),
        graph(8),
        {},
        "inside a reversible function",
        opaque=1,
    ),
    Row(
        "torch_geometric",
        "TransformerConv, beta",
        lambda p: _Stacked(p.nn.TransformerConv(8, 8, beta=True), p.nn.TransformerConv(8, 8, beta=True)),
        graph(8),
        {"gated": 2, "projection": 2},
        "b W x + (1 - b) out, and out - W x, which the gate reads",
    ),
    Row("vit_pytorch", "vit", _vit("vit", "ViT"), image(32), {"identity": 4}, "2 a layer"),
    Row("vit_pytorch", "deepvit", _vit("deepvit", "DeepViT"), image(32), {"identity": 4}, "2 a layer"),
    Row(
        "vit_pytorch",
        "cait",
        lambda p: _part("vit_pytorch.cait", "CaiT")(
            image_size=32, patch_size=8, num_classes=3, dim=16, depth=2, cls_depth=2, heads=2, mlp_dim=16
        ),
        image(32, count=2),
        {"identity": 8, "concat": 1},
        "2 a layer; the patches beside the second class attention",
    ),
    Row(
        "vit_pytorch",
        "xcit",
        lambda p: _part("vit_pytorch.xcit", "XCiT")(
            image_size=32, patch_size=8, num_classes=3, dim=16, depth=2, cls_depth=1, heads=2, mlp_dim=16
        ),
        image(32, count=2),
        {"identity": 8},
        "3 a layer, 2 in the class layer",
    ),
    Row(
        "vit_pytorch",
        "max_vit",
        lambda p: _part("vit_pytorch.max_vit", "MaxViT")(
            num_classes=3, dim_conv_stem=8, dim=8, dim_head=4, depth=(1, 1), window_size=4
        ),
        image(64),
        {"identity": 8},
        "2 attentions and 2 MLPs a block",
    ),
    Row(
        "vit_pytorch",
        "mobile_vit",
        lambda p: _part("vit_pytorch.mobile_vit", "MobileViT")(
            image_size=(64, 64),
            dims=[16, 24, 32],
            channels=[4, 4, 8, 8] + [16] * 7,
            num_classes=3,
            depths=(1, 1, 1),
        ),
        image(64),
        {"identity": 9, "concat": 3},
        "3 inverted residuals; 3 x 2; 3 fusions",
    ),
    Row(
        "vit_pytorch",
        "value residual",
        _vit("simple_vit_with_value_residual", "SimpleViT"),
        image(32),
        {"identity": 4, "gated": 1},
        "2 a layer; the first layer's values in the second",
    ),
    Row(
        "vit_pytorch",
        "hyper-connections",
        _vit("simple_vit_with_hyper_connections", "SimpleViT", num_residual_streams=2),
        image(32),
        {"projection": 4},
        "2 a layer",
    ),
    Row(
        "denoising_diffusion_pytorch",
        "Unet",
        lambda p: p.Unet(8, dim_mults=(1, 2)),
        lambda: (torch.randn(1, 3, 32, 32), torch.tensor([3])),
        {"identity": 11, "concat": 5, "projection": 5},
        "11 blocks, 5 attentions, 5 skips",
    ),
    Row(
        "hyper_connections",
        "dynamic",
        _on_streams("hyper_connections"),
        lambda: torch.randn(2, 5, 8),
        {"projection": 3},
        "one a block",
    ),
    Row(
        "hyper_connections",
        "manifold-constrained",
        _on_streams("hyper_connections.manifold_constrained_hyper_connections"),
        lambda: torch.randn(2, 5, 8),
        {"projection": 3},
        "one a block",
    ),
    Row(
        "torchdiffeq",
        "odeint",
        lambda p: _Integrated(p.odeint),
        lambda: torch.randn(3, 4),
        {"identity": 4},
        "one a step",
    ),
    Row(
        "torchdiffeq",
        "odeint_adjoint",
        lambda p: _Integrated(p.odeint_adjoint),
        lambda: torch.randn(3, 4),
        {},
        "inside the solver's function",
        opaque=1,
    ),
    Row(
        "nflows",
        "affine couplings",
        lambda p: _nflows(p, True),
        lambda: torch.randn(3, 4),
        {"identity": 4, "gated": 2, "concat": 2},
        "2 residual blocks, 1 coupling each; the half that passes is written beside the other",
    ),
    Row(
        "nflows",
        "autoregressive",
        lambda p: _nflows(p, False),
        lambda: torch.randn(3, 4),
        {"identity": 4, "gated": 2},
        "2 residual blocks and 1 transform each",
    ),
    Row(
        "normflows",
        "RealNVP of two numbers",
        _realnvp,
        lambda: torch.randn(4, 2),
        {"gated": 3, "concat": 3},
        "one coupling each, put beside its condition",
    ),
    Row(
        "normflows",
        "Planar",
        lambda p: _Stacked(*(p.flows.Planar((2,)) for _ in range(2))),
        lambda: torch.randn(4, 2),
        {"identity": 2},
        "one a layer",
    ),
    Row(
        "FrEIA",
        "NICE",
        lambda p: _freia(p, "NICECouplingBlock"),
        lambda: torch.randn(3, 4),
        {"identity": 4, "concat": 2},
        "2 sums a block, put together",
    ),
    Row(
        "FrEIA",
        "AllInOneBlock",
        lambda p: _freia(p, "AllInOneBlock"),
        lambda: torch.randn(3, 4),
        {"gated": 2, "concat": 2},
        "one coupling a block, put beside its condition",
    ),
    Row(
        "zuko",
        "MAF",
        lambda p: _Transformed(
            p.flows.MAF(4, transforms=2, hidden_features=(8,)), lambda f, x: f().transform(x)
        ),
        lambda: torch.randn(3, 4),
        {"gated": 2},
        "one a transform",
    ),
    Row("x_transformers", "plain", _x(), tokens(8), {"identity": 4}, "2 a layer"),
    Row("x_transformers", "scale_residual", _x(scale_residual=True), tokens(8), {"scaled": 4}, "2 a layer"),
    Row("x_transformers", "macaron", _x(macaron=True), tokens(8), {"identity": 6}, "3 a layer"),
    Row("x_transformers", "streams", _x(num_residual_streams=4), tokens(8), {"projection": 4}, "2 a layer"),
    Row(
        "x_transformers",
        "unet_skips",
        _x(unet_skips=True),
        tokens(8),
        {"identity": 4, "concat": 1},
        "2 a layer; one skip",
    ),
    Row("x_transformers", "gate_residual", _x(gate_residual=True), tokens(8), {}, "GRU cells", opaque=4),
    Row(
        "x_transformers",
        "encoder and decoder",
        lambda p: p.XTransformer(
            dim=16,
            enc_num_tokens=20,
            enc_depth=2,
            enc_heads=2,
            enc_max_seq_len=16,
            dec_num_tokens=20,
            dec_depth=2,
            dec_heads=2,
            dec_max_seq_len=16,
        ),
        lambda: {"src": tokens(8)(), "tgt": tokens(8)()},
        {"identity": 10},
        "2 and 3 a layer",
    ),
    Row(
        "local_attention",
        "LocalTransformer",
        _language("LocalTransformer", dim_head=8, local_attn_window_size=4, causal=True),
        tokens(16),
        {"projection": 4},
        "2 a layer, on hyper-connections",
    ),
    Row(
        "reformer_pytorch",
        "ReformerLM",
        _language("ReformerLM", bucket_size=4, n_hashes=2, causal=True),
        tokens(16),
        {},
        "inside a reversible function",
        opaque=1,
    ),
    Row(
        "performer_pytorch",
        "PerformerLM",
        _language("PerformerLM", causal=False, dim_head=8, nb_features=8),
        tokens(16),
        {"identity": 4},
        "2 a layer",
    ),
    Row(
        "performer_pytorch",
        "PerformerLM, reversible",
        _language("PerformerLM", causal=False, dim_head=8, nb_features=8, reversible=True),
        tokens(16),
        {},
        "inside a reversible function",
        opaque=1,
    ),
    Row(
        "linear_attention_transformer",
        "language model",
        _language("LinearAttentionTransformerLM", dim_head=8),
        tokens(16),
        {"identity": 4},
        "2 a layer",
    ),
    Row(
        "perceiver_pytorch",
        "Perceiver",
        lambda p: p.Perceiver(
            num_freq_bands=2, depth=2, max_freq=4.0, input_channels=3, num_classes=3, **_LATENTS
        ),
        lambda: torch.randn(1, 8, 8, 3),
        {"identity": 8},
        "4 a layer",
    ),
    Row(
        "conformer",
        "two blocks",
        lambda p: _Stacked(
            *(
                p.ConformerBlock(
                    dim=16, dim_head=8, heads=2, ff_mult=2, conv_expansion_factor=2, conv_kernel_size=5
                )
                for _ in range(2)
            )
        ),
        lambda: torch.randn(1, 8, 16),
        {"identity": 8},
        "4 a block",
    ),
    Row(
        "mlp_mixer_pytorch",
        "MLPMixer",
        lambda p: p.MLPMixer(image_size=32, channels=3, patch_size=8, dim=16, depth=2, num_classes=3),
        image(32),
        {"identity": 4},
        "2 a layer",
    ),
    Row(
        "g_mlp_pytorch",
        "gMLP",
        lambda p: p.gMLP(num_tokens=20, dim=16, depth=2, seq_len=16, ff_mult=2),
        tokens(16),
        {"identity": 2},
        "1 a layer",
    ),
    Row(
        "mambapy",
        "Mamba",
        lambda p: _part("mambapy.mamba", "Mamba")(
            _part("mambapy.mamba", "MambaConfig")(pscan=False, **_MAMBA)
        ),
        lambda: torch.randn(1, 8, 16),
        {"scaled": 2, "identity": 2},
        "around each mixer, and D past each scan",
    ),
    Row(
        "mambapy",
        "Mamba, parallel scan",
        lambda p: _part("mambapy.mamba", "Mamba")(_part("mambapy.mamba", "MambaConfig")(**_MAMBA)),
        lambda: torch.randn(1, 8, 16),
        {"scaled": 2, "identity": 2},
        "the same",
        opaque=2,
    ),
    Row(
        "egnn_pytorch",
        "EGNN",
        lambda p: p.EGNN(dim=8, m_dim=4),
        lambda: (torch.randn(1, 5, 8), torch.randn(1, 5, 3)),
        {"identity": 2, "concat": 1},
        "coordinates, features, features beside messages",
    ),
    Row(
        "nystrom_attention",
        "Nystromformer",
        lambda p: p.Nystromformer(dim=16, dim_head=8, heads=2, depth=2, num_landmarks=4, pinv_iterations=2),
        lambda: torch.randn(1, 8, 16),
        {"identity": 4},
        "2 a layer",
    ),
    Row(
        "bottleneck_transformer_pytorch",
        "BottleStack",
        lambda p: p.BottleStack(
            dim=16, fmap_size=8, dim_out=32, proj_factor=4, downsample=True, heads=2, dim_head=4
        ),
        lambda: torch.randn(1, 16, 8, 8),
        {"identity": 2},
        "3 blocks, of which the first skips by a bent map",
    ),
    Row(
        "pytorchcv",
        "shakeshakeresnet20",
        _cv("shakeshakeresnet20_2x16d_cifar10"),
        image(32),
        {"identity": 7, "projection": 2},
        "9 blocks, 2 of them wider",
    ),
    Row(
        "pytorchcv",
        "pyramidnet110",
        _cv("pyramidnet110_a48_cifar10"),
        image(32),
        {"identity": 54},
        "54 blocks, padded with zeros",
    ),
    Row(
        "pytorchcv", "wrn16", _cv("wrn16_10_cifar10"), image(32), {"projection": 3, "identity": 3}, "6 blocks"
    ),
    Row(
        "pytorchcv",
        "xdensenet40",
        _cv("xdensenet40_2_k24_bc_cifar10"),
        image(32),
        {"concat": 18},
        "18 layers",
    ),
    Row("pytorchcv", "peleenet", _cv("peleenet"), image(224), {"concat": 21}, "21 dense layers"),
    Row(
        "pytorchcv",
        "revnet38",
        _cv("revnet38"),
        image(224),
        {"projection": 2},
        "where the width changes; the others are in a function",
        opaque=1,
    ),
    Row(
        "pretrainedmodels",
        "xception",
        lambda p: p.xception(num_classes=10, pretrained=None),
        image(96),
        {"projection": 4, "identity": 8},
        "12 blocks",
    ),
    Row(
        "efficientnet_pytorch",
        "b0",
        lambda p: _alive(p.EfficientNet.from_name("efficientnet-b0")),
        image(64),
        {"identity": 9},
        "blocks of one size",
    ),
    Row(
        "resnest",
        "resnest50",
        lambda p: _part("resnest.torch", "resnest50")(pretrained=False),
        image(64),
        {"projection": 4, "identity": 12},
        "16 blocks",
    ),
    Row(
        "neuralop",
        "FNO",
        lambda p: _part("neuralop.models", "FNO")(
            n_modes=(4, 4), hidden_channels=8, in_channels=1, out_channels=1, n_layers=2
        ),
        image(16, 1),
        {"scaled": 2},
        "soft gates past the MLPs; spectral and 1x1 are both linear",
    ),
    Row(
        "asteroid",
        "DPRNNTasNet",
        lambda p: _part("asteroid.models", "DPRNNTasNet")(
            2, n_repeats=2, bn_chan=8, hid_size=8, n_filters=16, chunk_size=10
        ),
        lambda: torch.randn(1, 800),
        {"identity": 4},
        "2 a block",
        opaque=1,
    ),
    Row(
        "demucs",
        "Demucs",
        lambda p: _part("demucs.demucs", "Demucs")(
            ["a", "b"], channels=4, depth=2, resample=False, lstm_layers=0, dconv_attn=9, dconv_lstm=9
        ),
        lambda: torch.randn(1, 2, 2048),
        {"identity": 6},
        "4 dilated blocks, one skip that passes layers, the mean",
    ),
    Row(
        "open_clip",
        "CLIP",
        _clip,
        lambda: (torch.randn(1, 3, 32, 32), tokens(8)()),
        {"identity": 8},
        "2 a layer in two towers",
    ),
    Row(
        "kornia",
        "TinyViT",
        lambda p: p.contrib.TinyViT(
            img_size=64,
            embed_dims=[8, 16, 16, 32],
            depths=[1] * 4,
            num_heads=[1, 1, 2, 2],
            window_sizes=[4, 4, 4, 2],
            num_classes=3,
        ),
        image(64),
        {"identity": 7},
        "one convolution block; 3 x 2",
    ),
    Row(
        "pytorch_tabnet",
        "TabNet",
        lambda p: _part("pytorch_tabnet.tab_network", "TabNet")(4, 2, group_attention_matrix=torch.eye(4)),
        lambda: torch.randn(8, 4),
        {"identity": 12},
        "3 of 4 GLU layers in each of 4 transformers",
    ),
    Row(
        "rtdl_revisiting_models",
        "ResNet",
        lambda p: p.ResNet(
            d_in=3,
            d_out=1,
            n_blocks=3,
            d_block=8,
            d_hidden=None,
            d_hidden_multiplier=2.0,
            dropout1=0.0,
            dropout2=0.0,
        ),
        lambda: torch.randn(4, 3),
        {"identity": 3},
        "one a block",
    ),
    Row(
        "segment_anything",
        "ImageEncoderViT",
        lambda p: _part("segment_anything.modeling.image_encoder", "ImageEncoderViT")(
            img_size=64,
            patch_size=16,
            embed_dim=16,
            depth=2,
            num_heads=2,
            out_chans=8,
            window_size=2,
            use_rel_pos=True,
        ),
        image(64),
        {"identity": 4},
        "2 a layer",
    ),
    Row(
        "facenet_pytorch",
        "InceptionResnetV1",
        lambda p: p.InceptionResnetV1(classify=True, num_classes=3),
        image(96),
        {"identity": 21},
        "5 + 10 + 6 blocks",
    ),
    Row(
        "lpips",
        "squeeze",
        lambda p: p.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, verbose=False),
        lambda: (torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)),
        {},
        "fire modules are parallel; two images are compared",
    ),
    Row(
        "esm",
        "ESM2",
        lambda p: _part("esm.model.esm2", "ESM2")(num_layers=2, embed_dim=16, attention_heads=2),
        tokens(8),
        {"identity": 4},
        "2 a layer",
    ),
    Row(
        "hiera",
        "Hiera",
        lambda p: p.Hiera(
            input_size=(64, 64),
            embed_dim=8,
            num_heads=1,
            stages=(1, 1, 2, 1),
            q_pool=2,
            q_stride=(2, 2),
            mask_unit_size=(4, 4),
            num_classes=3,
        ),
        image(64),
        {"identity": 7, "projection": 3},
        "2 a block; 3 change width",
    ),
    Row(
        "ncps",
        "CfC",
        lambda p: _part("ncps.torch", "CfC")(4, 8, proj_size=2),
        lambda: torch.randn(2, 5, 4),
        {},
        "both sides of the gate are bent",
    ),
    Row(
        "axial_attention",
        "AxialImageTransformer",
        lambda p: p.AxialImageTransformer(dim=8, depth=2, heads=2, dim_heads=4, reversible=False),
        lambda: torch.randn(1, 8, 4, 4),
        {"identity": 8},
        "2 directions x 2 a layer",
    ),
    Row(
        "spandrel",
        "SwinIR",
        _spandrel(
            "SwinIR.__arch.SwinIR",
            "SwinIR",
            img_size=16,
            window_size=4,
            depths=[2, 2],
            embed_dim=8,
            num_heads=[2, 2],
            mlp_ratio=2,
            upscale=2,
            upsampler="pixelshuffle",
        ),
        image(16),
        {"identity": 11},
        "2 a layer, 2 groups, the whole",
    ),
    Row(
        "spandrel",
        "HAT",
        _spandrel(
            "HAT.__arch.HAT",
            "HAT",
            img_size=16,
            window_size=4,
            depths=[2],
            embed_dim=8,
            num_heads=[2],
            upscale=2,
            upsampler="pixelshuffle",
            squeeze_factor=4,
            compress_ratio=2,
        ),
        image(16),
        {"identity": 8},
        "2 a layer, 2 across, the group, the whole",
    ),
    Row(
        "spandrel",
        "RRDBNet",
        _spandrel("ESRGAN.__arch.RRDB", "RRDBNet", in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2),
        image(16),
        {"concat": 12, "identity": 5},
        "3 dense blocks of 4 and 1; the block, the whole",
    ),
    Row(
        "spandrel",
        "Uformer",
        _spandrel(
            "Uformer.__arch.Uformer",
            "Uformer",
            img_size=32,
            embed_dim=4,
            depths=[1] * 9,
            num_heads=[1] * 9,
            win_size=2,
        ),
        image(32),
        {"identity": 19, "concat": 4},
        "2 a block, 4 skips, the image",
    ),
    Row(
        "timm",
        "mobilenetv3_small_050",
        lambda p: p.create_model("mobilenetv3_small_050"),
        image(64),
        {"identity": 7},
        "blocks of one size; at half the width a wider one too",
    ),
    Row(
        "torchvision",
        "regnet_y_400mf",
        lambda p: p.models.regnet_y_400mf(),
        image(64),
        {"projection": 4, "identity": 12},
        "16 blocks",
    ),
)


def run(row: Row) -> dict[str, Any]:
    """Find the shortcuts of one model, edit all of them, and compare."""
    torch.manual_seed(0)
    package = importlib.import_module(row.package)
    if row.package in _PARTS:
        importlib.import_module(_PARTS[row.package])
    model = row.make(package).eval()
    x = row.inputs()
    found = find_shortcuts(model, x)
    kinds = dict(Counter(item.kind for item in found))
    count = len({item.name for item in found.opaque})
    counted = (
        kinds == row.expected and len(found.passed) == row.passed and count == len(set("x" * row.opaque))
    )
    return {
        "package": row.package, "version": _version(row.package), "model": row.name, "expected": row.expected, "found": kinds,
        "opaque": [item.name for item in found.opaque], "passed": len(found.passed), "not_run": len(found.not_run),
        "read": row.read, "counts_right": counted, "edits_right": edits_are_right(model, found, x),
    }  # fmt: skip


def edits_are_right(model: nn.Module, found: Shortcuts, x: Any) -> bool | None:
    """Whether the twins give what they should; None where nothing can be edited, or the output is 0."""
    if not len(found) or any(item.blocked for item in found):
        return None
    built = outputs(model, x)
    if not any(tensor.any() for tensor in built):
        return None
    removed = outputs(ablate(model, found), x)
    alike = (ablate(model, found, "detach"), ablate(model, found, strength=1.0))
    same = all(equal(outputs(twin, x), built) for twin in alike)
    return (
        same and equal(outputs(ablate(model, found, strength=0.0), x), removed) and not equal(removed, built)
    )


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    # torch's fused attention rounds otherwise than the calls that a twin can edit.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    return list(_data.tensors_in(getattr(out, "sample", out)))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "?"


def main(names: list[str]) -> None:
    """Print and keep the table."""
    warnings.simplefilter("ignore")
    rows = []
    for row in ROWS:
        if names and not any(name in f"{row.package}/{row.name}" for name in names):
            continue
        if importlib.util.find_spec(row.package) is None:
            print(f"{row.package:32} {row.name:26} not installed", flush=True)
            rows.append({"package": row.package, "model": row.name, "skipped": "not installed"})
            continue
        try:
            result = run(row)
        except Exception as error:  # a package that does not fit this torch is told, and the others go on
            result = {
                "package": row.package,
                "model": row.name,
                "error": f"{type(error).__name__}: {error}"[:300],
            }
        rows.append(result)
        told = (
            result.get("error")
            or f"{result['found']} counts {result['counts_right']} edits {result['edits_right']}"
        )
        print(f"{row.package:32} {row.name:26} {told}", flush=True)
    right = [r for r in rows if r.get("counts_right") and r.get("edits_right") in (True, None)]
    print(f"{len(right)} of {len(rows)} models right, {len({r['package'] for r in right})} packages right")
    if names and RESULTS.exists():  # run in parts: the other rows stay as they were
        kept = {(r["package"], r["model"]): r for r in json.loads(RESULTS.read_text())["rows"] + rows}
        rows = [kept[key] for row in ROWS if (key := (row.package, row.name)) in kept]
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
