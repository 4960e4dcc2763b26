"""Hugging Face's GPT-2 class with random weights, on English text: a model whose output carries its own loss.

Run it, or name its functions on the command line:

    skipscope compare examples/hf_gpt2.py:make_model --data examples/hf_gpt2.py:make_data

Needs transformers: python -m pip install transformers. Nothing is downloaded.
"""

import transformers

import skipscope as ss
from skipscope import reference


def make_model():
    """GPT-2 made small: 4 layers of width 64, byte tokens, dropout off."""
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=64, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_data():
    """64 passages of 64 bytes as a Mapping: its labels make the output carry a loss."""
    inputs, _ = reference.english(64, seed=0)
    return {"input_ids": inputs, "labels": inputs.clone()}


if __name__ == "__main__":
    model, data = make_model(), make_data()
    print(ss.find_shortcuts(model, data))
    print(ss.gradient_flow(model, data).verdict)
