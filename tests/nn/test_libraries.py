"""Where a well-kept library has the same module: the same numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import skipscope.nn as sn
from skipscope import reference


def branch():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


@pytest.mark.parametrize("norm_first", [True, False])
def test_pre_and_post_norm_are_torchs_encoder_layer(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first).train()

    class SelfAttention(nn.Module):
        def forward(self, x):
            return layer.self_attn(x, x, x, need_weights=False)[0]

    class FeedForward(nn.Module):
        def forward(self, x):
            return layer.linear2(torch.relu(layer.linear1(x)))

    wrap = sn.PreNorm if norm_first else sn.PostNorm
    ours = nn.Sequential(wrap(SelfAttention(), 8, norm=layer.norm1), wrap(FeedForward(), 8, norm=layer.norm2))
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), layer(x))


def test_gpt_is_huggingfaces_gpt2():
    transformers = pytest.importorskip("transformers")
    ours = reference.gpt(2, 16, 2, vocab=50, context=12).eval()
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = ours.state_dict()
    # Hugging Face keeps GPT-2's linear weights transposed.
    renamed = {
        "transformer." + k: v.T if any(part in k for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight")) else v
        for k, v in state.items() if k != "lm_head.weight"
    }  # fmt: skip
    left = theirs.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys and all("lm_head" in k or "attn" in k for k in left.missing_keys)
    ids = torch.randint(50, (3, 12))
    torch.testing.assert_close(ours(ids), theirs(ids).logits.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_is_torchvisions(mode):
    ops = pytest.importorskip("torchvision.ops")
    f = torch.randn(64, 3, 4)
    torch.manual_seed(0)
    expected = ops.stochastic_depth(f, 0.4, mode, training=True)
    torch.manual_seed(0)
    torch.testing.assert_close(sn.stochastic_depth(f, 0.4, True, mode), expected)


@pytest.mark.heavy
def test_stochastic_depth_and_layer_scale_are_timms():
    layers = pytest.importorskip("timm.layers")
    f = torch.randn(64, 8)
    torch.manual_seed(0)
    expected = layers.drop_path(f, 0.3, training=True)
    torch.manual_seed(0)
    torch.testing.assert_close(sn.stochastic_depth(f, 0.3, True), expected)
    theirs, x = layers.LayerScale(8, init_values=0.1), torch.randn(2, 8)
    torch.testing.assert_close(sn.layer_scale(x, f[:2], theirs.gamma), x + theirs(f[:2]))


@pytest.mark.heavy
def test_transformer_block_is_timms():
    vision = pytest.importorskip("timm.models.vision_transformer")
    theirs = vision.Block(8, 2, init_values=0.1).eval()
    ours = nn.Sequential(
        sn.PreNorm(nn.Sequential(theirs.attn, theirs.ls1), 8, norm=theirs.norm1),
        sn.PreNorm(nn.Sequential(theirs.mlp, theirs.ls2), 8, norm=theirs.norm2),
    )
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.heavy
@pytest.mark.parametrize("large", [False, True])
def test_resnet18_is_torchvisions(large):
    models = pytest.importorskip("torchvision.models")
    theirs = models.resnet18(num_classes=10).eval()
    if not large:
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = reference.resnet18(10, 3, large_images=large).eval()
    names = [name for name, _ in ours.named_parameters()] + [name for name, _ in ours.named_buffers()]
    values = [p for _, p in theirs.named_parameters()] + [b for _, b in theirs.named_buffers()]
    ours.load_state_dict(dict(zip(names, values)))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_manifold_hyper_connection_is_huggingfaces():
    """DeepSeek-V4's: streams beside the features, its mixing matrix transposed, and 1e-6 added here and there."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    torch.manual_seed(0)
    n, width = 4, 8
    config = transformers.DeepseekV4Config(hidden_size=width, hc_mult=n, hc_sinkhorn_iters=20)
    theirs, ours = (
        modeling.DeepseekV4HyperConnection(config),
        sn.ManifoldHyperConnection(branch(), n, width=width),
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(
                torch.randn_like(p) * 0.3
            )  # of great logits Sinkhorn's limit is far, and their 1e-6 tells
        # Theirs mixes by the transpose: the residual part of the weights is transposed here.
        order = torch.arange(n * (n + 2))
        order[2 * n :] = order[2 * n :].view(n, n).T.flatten()
        # Streams lie beside the features in both.
        ours.to_weights.weight.copy_(theirs.fn[order])
        ours.to_weights.bias.copy_(theirs.base[order])
        ours.scales.copy_(theirs.scale)
    x = torch.randn(2, 5, n, width)
    post, comb, collapsed = theirs(x)
    expected = post.unsqueeze(-1) * ours.branch(collapsed).unsqueeze(-2) + comb.transpose(-1, -2) @ x
    torch.testing.assert_close(ours(x.movedim(2, 0)).movedim(0, 2), expected, rtol=1e-3, atol=1e-4)


def test_low_rank_shortcut_is_gemma_3ns():
    """Without the norm that Gemma 3n adds to the paper's equation."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    theirs = modeling.Gemma3nTextLaurelBlock(transformers.Gemma3nTextConfig(hidden_size=8, laurel_rank=3))
    theirs.post_laurel_norm = nn.Identity()
    x = torch.randn(2, 5, 8)
    got = sn.laurel_low_rank(x, torch.zeros(()), theirs.linear_left.weight, theirs.linear_right.weight)
    torch.testing.assert_close(got, theirs(x))


def copied(module, **given):
    """The module with these parameters in place of its own."""
    with torch.no_grad():
        for name, value in given.items():
            module.get_parameter(name.replace("__", ".")).copy_(value)
    return module


def scattered(module):
    """Their module, which leaves its weights empty, with weights."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


@pytest.mark.parametrize(("family", "prefix"), [("deepseek_v4", "DeepseekV4"), ("hy_v4", "HYV4")])
def test_the_learned_sum_of_streams_is_theirs(family, prefix):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = getattr(transformers, f"{prefix}Config")(hidden_size=8, hc_mult=3)
    theirs = scattered(getattr(modeling, f"{prefix}HyperHead")(config))
    ours = copied(
        sn.StreamCollapse(3, 8), to_weights__weight=theirs.hc_fn, to_weights__bias=theirs.hc_base, scales=theirs.hc_scale
    )  # fmt: skip
    x = torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(ours(x.movedim(2, 0)), theirs(x), rtol=1e-4, atol=1e-5)


def test_unmixed_hyper_connections_are_hunyuans():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4")
    theirs = scattered(modeling.HYV4HyperConnection(transformers.HYV4Config(hidden_size=8, hc_mult=3)))
    ours = copied(
        sn.UnmixedHyperConnection(branch(), 3, width=8), to_weights__weight=theirs.fn, to_weights__bias=theirs.base,
        scales=theirs.scale,
    )  # fmt: skip
    x = torch.randn(2, 5, 3, 8)
    post, collapsed = theirs(x)
    expected = post.unsqueeze(-1) * ours.branch(collapsed).unsqueeze(-2) + x
    torch.testing.assert_close(ours(x.movedim(2, 0)).movedim(0, 2), expected, rtol=1e-4, atol=1e-5)


def test_gated_streams_are_qwens():
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    config = SimpleNamespace(hc_count=3, hidden_size=8, hc_lowrank=5, rms_norm_eps=1e-6)
    theirs = scattered(modeling.Qwen4ExpTextGatedResidual(config))
    ours = copied(
        sn.GatedStreams(branch(), 3, width=8, rank=5), gates__gain=1 + theirs.hc_norm.weight,
        gates__down__weight=theirs.input_mix_weight_down.weight, gates__up__weight=theirs.input_mix_weight_up.weight,
        inject__weight=theirs.block_inject_weight.weight,
    )  # fmt: skip
    x = torch.randn(2, 5, 3, 8)
    read, streams, inject = theirs(x.flatten(-2))
    expected = streams + (ours.branch(read).unsqueeze(-2) * inject.unsqueeze(-1)).flatten(-2)
    torch.testing.assert_close(
        ours(x.movedim(2, 0)).movedim(0, 2).flatten(-2), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(ours.gates(x.movedim(2, 0)), read, rtol=1e-4, atol=1e-5)


def test_variance_gate_is_muse_sparks():
    modeling = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    theirs = scattered(
        modeling.MuseSparkResidualGate(SimpleNamespace(hidden_size=8, residual_gate_temperature=0.3))
    )
    x, f = torch.randn(2, 2, 5, 8)
    ours = copied(sn.VarianceGate(branch(), 8), gate=theirs.gate)
    torch.testing.assert_close(ours.write(x, f), theirs(x, f))


def test_affine_residual_is_zayas():
    modeling = pytest.importorskip("transformers.models.zaya.modeling_zaya")
    theirs = scattered(modeling.ZayaResidualScaling(8))
    x, f = torch.randn(2, 2, 5, 8)
    ours = copied(
        sn.AffineResidual(branch(), 8), scale=torch.stack([theirs.residual_scale, theirs.hidden_states_scale]),
        offset=torch.stack([theirs.residual_bias, theirs.hidden_states_bias]),
    )  # fmt: skip
    torch.testing.assert_close(ours.write(x, f), theirs(f, x))


@pytest.mark.parametrize("active", [0, 2])
def test_altup_is_gemma_3ns_where_its_router_says_the_same_for_every_token(active):
    """Google's own model in transformers predicts and corrects alike, with coefficients that a router adds to."""
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    n, width = 3, 8
    config = SimpleNamespace(
        hidden_size=width,
        altup_num_inputs=n,
        rms_norm_eps=1e-6,
        altup_active_idx=active,
        altup_coef_clip=None,
    )
    theirs = modeling.Gemma3nTextAltUp(config)
    ours = sn.AltUp(branch(), n, layer=active)
    said = torch.tensor([1.0, 0.0, 0.0])
    theirs.compute_router_modalities = lambda x: said.expand(*x.shape[:-1], n)
    with torch.no_grad():
        ours.predict.copy_(torch.randn(n, n)), ours.correct.copy_(torch.randn(n))
        theirs.prediction_coefs.weight[:, 0] = (ours.predict - torch.eye(n)).flatten()
        theirs.correction_coefs.weight[:, 0] = ours.correct - 1
        streams = torch.randn(n, 2, 5, width)
        computed = streams[active] + ours.branch(streams[active])
        expected = theirs.correct(theirs.predict(streams), computed)
        torch.testing.assert_close(ours(streams), expected, rtol=1e-4, atol=1e-5)
