"""Tiny random checkpoints in the layout that models are published in, written with numpy alone.

transformers loads them (that is how tests get their oracle), but is not needed to make them: milliseconds, and the
same bytes whatever its version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.tensor_file import encode_header

BOS, EOS = 256, 257  # the ids before them are bytes
VOCAB = 320  # a few ids more than the tokenizer knows, as published models have

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 24,
        "num_local_experts": 8,
        "sliding_window": None,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 8,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "head_dim": 16,  # not hidden_size / num_attention_heads
        "norm_topk_prob": True,
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": 24,
        "num_experts": 8,
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
    },
    "granitemoe": {
        "architectures": ["GraniteMoeForCausalLM"],
        "intermediate_size": 24,
        "num_local_experts": 8,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.05,  # 1 / sqrt(head_dim) is 0.35
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    },
}
FAMILIES = tuple(_FAMILIES)
# Published name -> name in transformers 5, for what is not stacked as well.
_RENAMED = (
    ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.gate.weight", "mlp.gate.weight"),
)
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

Array = npt.NDArray[Any]


def tiny_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    fused: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with a byte-level tokenizer.

    Args:
        folder: is made.
        family: one of `FAMILIES`.
        seed: of the weights.
        dtype: "float32", "float16" or "bfloat16".
        shards: number of safetensors files; more than one come with an index.
        fused: name the tensors as transformers 5 holds them, the experts of a block in two tensors; otherwise as
            they are published. The weights are the same.
        overrides: fields of config.json, for example `num_key_value_heads`, `tie_word_embeddings`, `qkv_bias`.

    Returns:
        The folder.
    """
    config = {"model_type": family, **_COMMON, **_FAMILIES[family], "torch_dtype": dtype, **overrides}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    rng = np.random.default_rng(seed)
    tensors = {name: _draw(rng, name, shape) for name, shape in _shapes(config)}
    if fused:
        tensors = _fused(tensors)
    _write_weights(folder, tensors, _DTYPE_NAMES[dtype], shards)
    return folder


def write_checkpoint_file(path: Path, tensors: dict[str, Array], dtype: str) -> None:
    """Write float32 tensors as one safetensors file of type F32, F16 or BF16 (cut off, not rounded)."""
    header, _ = encode_header({name: (dtype, tensor.shape) for name, tensor in tensors.items()})
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(_stored(np.ascontiguousarray(tensor, np.float32), dtype).tobytes())


def byte_tokenizer() -> dict[str, Any]:
    """Describe a tokenizer of the `tokenizers` library whose ids are the bytes of the text, in UTF-8."""
    specials = [(BOS, "<s>"), (EOS, "</s>")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in specials],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {char: byte for byte, char in enumerate(_byte_chars())} | {text: n for n, text in specials},
            "merges": [],
        },
    }  # fmt: skip


def _byte_chars() -> list[str]:
    """Name the printable characters that stand for the 256 bytes (the table of GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    d_model, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or d_model // heads
    widths = {"q": heads * head_dim, "k": config["num_key_value_heads"] * head_dim}
    widths["v"] = widths["k"]
    yield "model.embed_tokens.weight", (config["vocab_size"], d_model)
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        yield f"{prefix}.input_layernorm.weight", (d_model,)
        for letter, width in widths.items():
            yield f"{prefix}.self_attn.{letter}_proj.weight", (width, d_model)
            if config.get("qkv_bias") or config.get("attention_bias"):
                yield f"{prefix}.self_attn.{letter}_proj.bias", (width,)
        yield f"{prefix}.self_attn.o_proj.weight", (d_model, widths["q"])
        if config.get("attention_bias"):
            yield f"{prefix}.self_attn.o_proj.bias", (d_model,)
        if config["model_type"] in ("qwen3_moe", "olmoe"):
            for letter in ("q", "k"):
                size = head_dim if config["model_type"] == "qwen3_moe" else widths[letter]
                yield f"{prefix}.self_attn.{letter}_norm.weight", (size,)
        yield f"{prefix}.post_attention_layernorm.weight", (d_model,)
        yield from _moe_shapes(config, prefix)
    yield "model.norm.weight", (d_model,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], d_model)


def _moe_shapes(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    d_model = config["hidden_size"]
    n_experts = config.get("num_experts") or config["num_local_experts"]
    d_ff = config.get("moe_intermediate_size") or config["intermediate_size"]
    if config["model_type"] == "granitemoe":
        yield f"{prefix}.block_sparse_moe.router.layer.weight", (n_experts, d_model)
        yield f"{prefix}.block_sparse_moe.input_linear.weight", (n_experts, 2 * d_ff, d_model)
        yield f"{prefix}.block_sparse_moe.output_linear.weight", (n_experts, d_model, d_ff)
        return
    moe, names = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")
    if config["model_type"] == "mixtral":
        moe, names = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
    if config["model_type"] == "qwen2_moe":
        yield from _feed_forward(f"{moe}.shared_expert", names, config["shared_expert_intermediate_size"], d_model)
        yield f"{moe}.shared_expert_gate.weight", (1, d_model)
    yield f"{moe}.gate.weight", (n_experts, d_model)
    for expert in range(n_experts):
        yield from _feed_forward(f"{moe}.experts.{expert}", names, d_ff, d_model)


def _feed_forward(
    prefix: str, names: tuple[str, str, str], d_ff: int, d_model: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    gate, up, down = names
    yield f"{prefix}.{gate}.weight", (d_ff, d_model)
    yield f"{prefix}.{up}.weight", (d_ff, d_model)
    yield f"{prefix}.{down}.weight", (d_model, d_ff)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Draw weights that keep rows at about unit size, so that gates, norms and biases all matter."""
    values = rng.standard_normal(shape, np.float32)
    if "q_norm" in name or "k_norm" in name:
        return 1 + np.float32(0.4) * values
    if "norm" in name:
        return 1 + np.float32(0.1) * values
    if name.endswith("bias") or "embed" in name:
        return values
    return values / np.float32(np.sqrt(shape[-1]))


def _fused(tensors: dict[str, Array]) -> dict[str, Array]:
    """Rename published tensors to those of transformers 5, and stack what experts have one by one."""
    renamed: dict[str, Array] = {}
    stacks: dict[str, list[Array]] = {}  # each block's gates, ups and downs, by the tensor's name without the number
    for name, tensor in tensors.items():
        if re.search(r"\.experts\.\d+\.", name):
            stacks.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(tensor)
            continue
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = tensor
    for name, stack in stacks.items():
        prefix, weight = name.removesuffix(".weight").rsplit(".", 1)
        prefix = prefix.replace("block_sparse_moe", "mlp")
        if weight in ("w2", "down_proj"):
            renamed[f"{prefix}.down_proj"] = np.stack(stack)
        elif weight in ("w1", "gate_proj"):
            ups = stacks[name.replace(weight, {"w1": "w3", "gate_proj": "up_proj"}[weight])]
            renamed[f"{prefix}.gate_up_proj"] = np.concatenate([np.stack(stack), np.stack(ups)], axis=1)
    return renamed


def _write_weights(folder: Path, tensors: dict[str, Array], dtype: str, shards: int) -> None:
    if shards == 1:
        write_checkpoint_file(folder / "model.safetensors", tensors, dtype)
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        write_checkpoint_file(folder / file_name, part, dtype)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.size for tensor in tensors.values()) * {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _stored(tensor: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return (tensor.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return tensor.astype(np.float16) if dtype == "F16" else tensor
