"""The dense model of the Llama family as plain tensors, in bfloat16, and text to train on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

WINDOW = 512  # tokens
HELD_OUT_SHARE = 0.05  # of each corpus file, from its end
HELD_OUT_WINDOWS = 32
# Windows to train on are drawn by these shares: running text of an encyclopaedia first, as most text is prose.
SHARES = {
    "wikipedia_en_sample": 0.5,
    "classic_books": 0.15,
    "qa_train": 0.12,
    "household_management": 0.05,
    "openstax_anatomy-physiology": 0.05,
    "openstax_chemistry-bundle": 0.05,
    "openstax_physics": 0.05,
    "wordnet_glosses": 0.03,
}


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one dense block: matrices in bfloat16 with what shares an input in one, norms in float32."""

    qkv: torch.Tensor  # [q + 2 kv, hidden]
    o: torch.Tensor  # [hidden, q]
    gate_up: torch.Tensor  # [2 neurons, hidden]
    down: torch.Tensor  # [hidden, neurons]
    input_norm: torch.Tensor  # [hidden]
    ffn_norm: torch.Tensor  # [hidden]


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense model with tied embeddings."""

    blocks: tuple[Block, ...]
    embedding: torch.Tensor  # [vocabulary, hidden]
    norm: torch.Tensor  # [hidden]
    eps: float
    theta: float
    heads: int
    kv_heads: int

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding.shape[1])

    @property
    def neurons(self) -> int:
        """Neurons of a feed-forward block."""
        return int(self.blocks[0].down.shape[1])


def load_dense(folder: Path) -> Dense:
    """Read a checkpoint folder of model type `llama` with tied embeddings."""
    from safetensors.torch import load_file

    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    def block(index: int) -> Block:
        def weight(name: str) -> torch.Tensor:
            return tensors[f"model.layers.{index}.{name}.weight"]

        def stacked(*names: str) -> torch.Tensor:
            return torch.cat([weight(name) for name in names]).bfloat16()

        return Block(
            qkv=stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=stacked("self_attn.o_proj"),
            gate_up=stacked("mlp.gate_proj", "mlp.up_proj"),
            down=stacked("mlp.down_proj"),
            input_norm=weight("input_layernorm").float(),
            ffn_norm=weight("post_attention_layernorm").float(),
        )

    return Dense(
        blocks=tuple(block(index) for index in range(config["num_hidden_layers"])),
        embedding=tensors["model.embed_tokens.weight"].bfloat16(),
        norm=tensors["model.norm.weight"].float(),
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
    )


def rope(model: Dense, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary embedding, [tokens, half a head]."""
    half = model.hidden // model.heads // 2
    frequencies = model.theta ** (-torch.arange(half).float() / half)
    angles = torch.outer(torch.arange(tokens).float(), frequencies)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise rows [..., hidden] in float32; bfloat16 comes back."""
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight).bfloat16()


def attention(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Return what attention hands to its output projection, [batch, tokens, q], for qkv [batch, tokens, q + 2 kv]."""
    batch, tokens, width = qkv.shape
    size = width // (heads + 2 * kv_heads)

    def turned(part: torch.Tensor) -> torch.Tensor:
        first, second = part[..., : size // 2], part[..., size // 2 :]
        c, s = cos[:, None], sin[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    q, k, v = (
        part.view(batch, tokens, -1, size) for part in qkv.split([heads * size, kv_heads * size, kv_heads * size], -1)
    )
    k, v = (part.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for part in (turned(k), v))
    seen = F.scaled_dot_product_attention(turned(q).transpose(1, 2), k, v, is_causal=True)
    return seen.transpose(1, 2).reshape(batch, tokens, heads * size)


def dense_block(
    rows: torch.Tensor, block: Block, cos: torch.Tensor, sin: torch.Tensor, eps: float, heads: int, kv_heads: int
) -> torch.Tensor:
    """Return the residual stream [batch, tokens, hidden], in float32, after a dense block."""
    seen = attention(F.linear(rms_norm(rows, block.input_norm, eps), block.qkv), cos, sin, heads, kv_heads)
    rows = rows + F.linear(seen, block.o).float()
    gate, up = F.linear(rms_norm(rows, block.ffn_norm, eps), block.gate_up).chunk(2, -1)
    return rows + F.linear(F.silu(gate) * up, block.down).float()


def corpus_windows(data_dir: Path, tokenizer: Any, windows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows [n, WINDOW] of tokens to train on, drawn by `SHARES` and shuffled, and held out ones, of all files.

    Raises:
        FileNotFoundError: a file of the corpus is missing.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for name, share in sorted(SHARES.items()):
        text = (data_dir / "corpus" / f"{name}.txt").read_text(encoding="utf-8")
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        first, last = (
            _cut(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in (text[:cut], text[cut:])
        )
        train.append(first[torch.randperm(len(first), generator=generator)][: round(windows * share)])
        held_out.append(last)
    joined, held = torch.cat(train), torch.cat(held_out)
    joined = joined[torch.randperm(len(joined), generator=generator)]
    return joined, held[torch.randperm(len(held), generator=generator)][:HELD_OUT_WINDOWS]


def _cut(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
