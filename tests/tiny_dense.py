"""Tiny random dense checkpoints of the Llama family, in the layout that models are published in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": tiny.VOCAB,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 16},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 128,
        "max_window_layers": 2,
    },
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
TEXT = "".join(
    f"Line {number}: the {('kettle', 'film', 'scheduler', 'radio')[number % 4]} has {number * 37 % 101} words to say.\n"
    for number in range(400)
)


def tiny_dense(
    folder: Path, family: str, *, seed: int = 0, dtype: str = "float32", shards: int = 1, **overrides: Any
) -> Path:
    """Write a random dense checkpoint with a byte-level tokenizer, and return its folder; see `tiny_checkpoint`."""
    config = {"model_type": family, **_COMMON, **_FAMILIES[family], "torch_dtype": dtype, **overrides}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tiny.byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "LICENSE").write_text("none")
    rng = np.random.default_rng(seed)
    tensors = {name: tiny._draw(rng, name, shape) for name, shape in _shapes(config)}
    tiny._write_weights(folder, tensors, tiny._DTYPE_NAMES[dtype], shards)
    return folder


def text_file(path: Path, text: str = TEXT) -> Path:
    """Write calibration text."""
    path.write_text(text, encoding="utf-8")
    return path


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    d_model, d_ff = config["hidden_size"], config["intermediate_size"]
    for name, shape in tiny._shapes({**config, "model_type": "mixtral", "num_local_experts": 1}):
        if "block_sparse_moe" in name:
            continue
        yield name, shape
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and config["model_type"] == "qwen2":
            yield name.replace("weight", "bias"), shape[:1]
        if name.endswith("post_attention_layernorm.weight"):
            prefix = name.removesuffix("post_attention_layernorm.weight") + "mlp"
            yield f"{prefix}.gate_proj.weight", (d_ff, d_model)
            yield f"{prefix}.up_proj.weight", (d_ff, d_model)
            yield f"{prefix}.down_proj.weight", (d_model, d_ff)
