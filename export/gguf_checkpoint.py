"""Reads a GGUF file of the Llama family as a dense Hugging Face checkpoint: tensors, config and tokenizer.

The inverse of llama.cpp's `convert_hf_to_gguf.py`; quantised tensors come back as float32. Nothing here knows
about experts: `carve.py` takes what this module gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.errors import CheckpointError
from wdmoe.runtime.tensor_file import write_tensors

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

# GGUF name -> Hugging Face name, inside a block and outside of one.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """What the metadata of a GGUF file says about the model."""

    blocks: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    rope_theta: float
    rms_norm_eps: float


class GgufCheckpoint:
    """A GGUF file, opened (mapped, not read): `shape`, `metadata`, and its tensors one by one."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path} is not a GGUF file that can be read: {error}") from error
        self.path = path
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path} holds architecture {architecture!r}; expected 'llama'")
        self.shape = self._shape()

    def _shape(self) -> LlamaShape:
        def value(name: str) -> Any:
            try:
                return self.metadata[f"llama.{name}"]
            except KeyError:
                raise CheckpointError(f"{self.path} has no metadata field llama.{name}") from None

        heads = int(value("attention.head_count"))
        return LlamaShape(
            blocks=int(value("block_count")),
            hidden=int(value("embedding_length")),
            ffn=int(value("feed_forward_length")),
            heads=heads,
            kv_heads=int(self.metadata.get("llama.attention.head_count_kv", heads)),
            vocab=len(self.metadata["tokenizer.ggml.tokens"]),
            context=int(value("context_length")),
            rope_theta=float(self.metadata.get("llama.rope.freq_base", 10_000.0)),
            # The file holds float32: 9.999999747378752e-06 was written as 1e-05.
            rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        )

    def tensors(self) -> Iterator[tuple[str, FloatArray]]:
        """Yield the Hugging Face name and the values of every tensor, one tensor in memory at a time."""
        from gguf.quants import dequantize

        for tensor in self._tensors.values():
            name = hf_name(tensor.name)
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if name.endswith("self_attn.q_proj.weight"):
                values = unpermute_rope(values, self.shape.heads)
            elif name.endswith("self_attn.k_proj.weight"):
                values = unpermute_rope(values, self.shape.kv_heads)
            yield name, values

    def config(self) -> dict[str, Any]:
        """Return the config.json of the dense model; a carved one overrides a few fields."""
        shape = self.shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.blocks,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": shape.context,
            "rms_norm_eps": shape.rms_norm_eps,
            # transformers 5 reads `rope_parameters`, transformers 4 reads `rope_theta`.
            "rope_theta": shape.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor: `blk.3.attn_q.weight` -> `model.layers.3.self_attn...`."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise CheckpointError(f"GGUF tensor {name!r} has no place in a Llama checkpoint")
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"


def unpermute_rope(weight: Array, heads: int) -> Array:
    """Undo the row order that llama.cpp gives Q and K for its interleaved rotary embedding.

    In each head, rows (0, h/2, 1, h/2 + 1, ...) of the published weight stand in a row in the GGUF file.

    Args:
        weight: [heads * head_size, hidden], as in the file.
        heads: number of query heads for Q, of key-value heads for K.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], gguf: GgufCheckpoint
) -> None:
    """Write a checkpoint into an empty folder: config.json, model.safetensors and the GGUF file's tokenizer."""
    write_tensors(folder / "model.safetensors", tensors)
    _write_json(folder / "config.json", config)
    token_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", token_ids)
    write_tokenizer(folder, gguf.metadata)


def write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json from the `tokenizer.*` fields of a GGUF file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"the tokenizer of the GGUF file is {kind}; expected ('gpt2', 'smollm')")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # What llama.cpp calls pre-tokenizer `smollm`: every digit is a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    special = [token for token, token_type in zip(tokens, types, strict=True) if token_type == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token_of(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    _write_json(
        folder / "tokenizer_config.json",
        {
            # Not a class of one model: those of transformers 5 put their own pre-tokenizer in place of ours.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token_of("bos"),
            "eos_token": token_of("eos"),
            "unk_token": token_of("unknown"),
            "pad_token": token_of("padding"),
            "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"],
            "chat_template": metadata.get("tokenizer.chat_template"),
        },
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
