"""Model classes of Hugging Face transformers, with random weights: encoders, decoders, vision, audio, scans, experts."""

from __future__ import annotations

import pytest
import torch

from skipscope.shortcuts import ablate, find_shortcuts

pytestmark = pytest.mark.heavy
hf = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
}
IDS = torch.arange(12).reshape(2, 6) % 50 + 3
IMAGE = torch.linspace(-9, 9, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip
TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
VISION = {"image_size": 32, "patch_size": 8, **{k: v for k, v in SMALL.items() if k != "vocab_size"}}

# class, configuration class, its options, inputs, and how many shortcuts it is known to have
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60}, TEXT, 4),
    "LlamaForCausalLM": ("LlamaConfig", SMALL, TEXT, 4),
    "MistralForCausalLM": ("MistralConfig", {**SMALL, "num_key_value_heads": 1}, TEXT, 4),
    "Qwen2ForCausalLM": ("Qwen2Config", {**SMALL, "num_key_value_heads": 1}, TEXT, 4),
    "Gemma2ForCausalLM": ("Gemma2Config", {**SMALL, "head_dim": 16, "num_key_value_heads": 1}, TEXT, 4),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL, TEXT, 2),
    "GPTJForCausalLM": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "vocab_size": 60}, TEXT, 2),
    "OPTForCausalLM": ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, TEXT, 4),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 60}, TEXT, 4),
    "PhiForCausalLM": ("PhiConfig", SMALL, TEXT, 2),
    "FalconForCausalLM": ("FalconConfig", SMALL, TEXT, 2),
    "MixtralForCausalLM": ("MixtralConfig", {**SMALL, **EXPERTS, "num_key_value_heads": 1}, TEXT, 4),
    "MambaForCausalLM": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 60, "use_cache": False},
        TEXT,
        4,  # around each mixer, and D past the scan
    ),
    "BertModel": ("BertConfig", SMALL, TEXT, 4),
    "RobertaModel": ("RobertaConfig", SMALL, TEXT, 4),
    "DistilBertModel": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, TEXT, 4),
    "ElectraModel": ("ElectraConfig", {**SMALL, "embedding_size": 32}, TEXT, 4),
    "AlbertModel": ("AlbertConfig", {**SMALL, "embedding_size": 16}, TEXT, 4),
    "DebertaV2Model": ("DebertaV2Config", {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, TEXT, 4),
    "T5Model": ("T5Config", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 60}, BOTH, 10),
    "BartModel": ("BartConfig", ENCODER_DECODER, BOTH, 10),
    "WhisperModel": (
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10},
        {"input_features": torch.linspace(-9, 9, 320).sin().reshape(2, 8, 20), "decoder_input_ids": IDS},
        10,
    ),
    "ViTModel": ("ViTConfig", VISION, {"pixel_values": IMAGE}, 4),
    "DeiTModel": ("DeiTConfig", VISION, {"pixel_values": IMAGE}, 4),
    "Dinov2Model": ("Dinov2Config", VISION, {"pixel_values": IMAGE}, 4),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4},
        {"pixel_values": IMAGE},
        6,
    ),
    "ConvNextModel": ("ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}, {"pixel_values": IMAGE}, 3),
    "ResNetModel": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
        {"pixel_values": IMAGE},
        4,
    ),
    "PoolFormerModel": (
        "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
        {"pixel_values": IMAGE},
        8,
    ),
    "Wav2Vec2Model": (
        "Wav2Vec2Config",
        {**SMALL, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        {"input_values": torch.linspace(-90, 90, 800).sin().reshape(2, 400)},
        5,  # the convolutional position embedding is added to what it is computed from
    ),
    # Scores that are sums of content and position, an activation function with weights, a difference of two attentions,
    # and a modulator that sums gated contexts: none of these is a shortcut of its own.
    "ProphetNetModel": (
        "ProphetNetConfig",
        {"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_layers": 2, "num_decoder_layers": 2,
         "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 64},
        BOTH,
        10,
    ),
    "ApertusForCausalLM": ("ApertusConfig", {**SMALL, "num_key_value_heads": 2}, TEXT, 4),
    "DiffLlamaForCausalLM": ("DiffLlamaConfig", {**SMALL, "num_key_value_heads": 2}, TEXT, 4),
    "FocalNetModel": (
        "FocalNetConfig", {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1]}, {"pixel_values": IMAGE}, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_known_counts_and_edits(name):
    config, options, inputs, count = MODELS[name]
    torch.manual_seed(0)
    model = getattr(hf, name)(getattr(hf, config)(**options)).eval()
    found = find_shortcuts(model, inputs)
    assert len(found) == count, "\n".join(f"{s.name} {s.kind} {s.source}" for s in found)

    def first(m):
        torch.manual_seed(0)
        return next(v for v in m(**inputs).values() if isinstance(v, torch.Tensor))

    expected = first(model)
    assert torch.equal(first(ablate(model, found, "detach")), expected)
    removed = ablate(model, found)
    assert type(removed).__name__ == name and removed.config is not None
    assert not torch.equal(first(removed), expected)


def test_an_edited_model_generates():
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, eos_token_id=1, bos_token_id=1)
    )
    twin = ablate(model.eval(), inputs=TEXT, strength=1.0)
    ours, theirs = (m.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (twin, model))
    assert torch.equal(ours, theirs)
