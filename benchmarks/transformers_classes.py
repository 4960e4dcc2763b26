"""Finding and editing in every model type of transformers that can be made small.

``python -m benchmarks.transformers_classes [TYPE ...]``: a line for each type of its registry (random weights, sizes
reduced by the names of their settings); types that cannot be made small, or take other inputs, are counted. What
differs from the last table kept in ``results`` is printed. Edits are checked as in :mod:`benchmarks.other_packages`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.other_packages import edits_are_right
from skipscope.shortcuts import find_shortcuts

RESULTS = Path(__file__).parent / "results" / "transformers_classes.json"
# Settings by their names, and what they become.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("image_size", "input_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 10),
    "vocab_size": 60, "patch_size": 8, "head_dim": 16, "d_kv": 16, "num_mel_bins": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False, "state_size": 4,
    "word_embed_proj_dim": 32, "projection_dim": 32, "num_local_heads": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "rotary_dim": 8, "sliding_window": 4,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
LISTS: dict[str, Any] = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "embed_dims": [8, 16, 16, 16],
    "num_attention_heads": [1, 2, 2, 2], "num_heads": [1, 2, 2, 2],
    "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
}  # fmt: skip
MOST_PARAMETERS, SECONDS = 20_000_000, 60
IDS = torch.arange(12).reshape(2, 6) % 50 + 3
INPUTS = {
    "input_ids": IDS,
    "pixel_values": torch.linspace(-9, 9, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32),
    "input_values": torch.linspace(-90, 90, 800).sin().reshape(2, 400),
    "input_features": torch.linspace(-9, 9, 320).sin().reshape(2, 8, 20),
}


def shrink(config: Any) -> Any:
    """Set the sizes of a configuration, and of those inside it."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, bool) and name in SMALL:
            setattr(config, name, bool(SMALL[name]))
        elif isinstance(value, list | tuple) and name in LISTS and all(isinstance(v, int) for v in value):
            setattr(config, name, LISTS[name][: len(value)])
        elif (isinstance(value, int) and name in SMALL) or (name == "pad_token_id" and value is None):
            setattr(config, name, SMALL[name])
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = list(config.layer_types)[: SMALL["num_hidden_layers"]]
    return config


def make(config: Any) -> nn.Module:
    """A model of a configuration, if it is small."""
    hf = sys.modules["transformers"]
    with torch.device("meta"):
        size = sum(p.numel() for p in hf.AutoModel.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    return hf.AutoModel.from_config(config).eval()


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """What a model is called with: the first of a few combinations that it accepts."""
    first = {model.main_input_name: INPUTS[model.main_input_name]}
    choices = [first, {**first, "decoder_input_ids": IDS}]
    choices += [{"input_ids": IDS, name: INPUTS[name]} for name in INPUTS if name != "input_ids"]
    choices = choices[1:] if getattr(model.config, "is_encoder_decoder", False) else choices
    reason: Exception | None = None
    for given in choices:
        try:
            with torch.no_grad():
                model(**given)
        except Exception as error:
            reason = reason or error
        else:
            return given
    raise reason or ValueError("no inputs")


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` after some seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, config_class: Any) -> dict[str, Any]:
    """Find the shortcuts of one type, edit all of them, and compare."""
    try:
        with limited(SECONDS):
            model = make(shrink(config_class()))
            given = inputs_of(model)
    except Exception as error:
        return {"type": name, "skipped": f"{type(error).__name__}: {error}"[:120]}
    try:
        with limited(SECONDS):
            found = find_shortcuts(model, given)
            edits = edits_are_right(model, found, given)
    except Exception as error:
        return {"type": name, "error": f"{type(error).__name__}: {error}"[:300]}
    layers = getattr(model.config, "num_hidden_layers", None)
    return {
        "type": name, "class": type(model).__name__, "layers": layers, "found": dict(Counter(s.kind for s in found)),
        "at": sorted(Counter(f"{s.source} {s.kind}" for s in found).items()),
        "opaque": sorted({item.name for item in found.opaque}), "edits_right": edits,
    }  # fmt: skip


def main(names: list[str]) -> None:
    """Print and keep the table."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    known = {row["type"]: row for row in before}
    rows = []
    for name in names or list(CONFIG_MAPPING):
        try:
            result = json.loads(json.dumps(run(name, CONFIG_MAPPING[name])))
        except Exception as error:
            result = {"type": name, "skipped": f"{type(error).__name__}: {error}"[:120]}
        rows.append(result)
        changed = name in known and known[name].get("found") != result.get("found")
        shown = (
            result.get("skipped") or result.get("error") or f"{result['found']} edits {result['edits_right']}"
        )
        print(f"{name:32} {shown}{f'   was {known[name]}' if changed else ''}", flush=True)
    ran = [row for row in rows if "found" in row]
    right = [row for row in ran if row["edits_right"] is not False]
    failed = [row["type"] for row in rows if "error" in row]
    print(f"{len(ran)} of {len(rows)} types ran, {len(right)} with right edits; errors: {failed}")
    if names:  # run in parts: the other rows stay as they were
        rows = list({row["type"]: row for row in before + rows}.values())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
