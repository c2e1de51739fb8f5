"""The dense model of the Llama family as plain torch tensors, in bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from wdmoe.export.conversion import to_float32
from wdmoe.export.dense import DenseModel, ffn_names
from wdmoe.runtime.manifest import Rope


@dataclass(frozen=True, slots=True)
class Block:
    """The weights of one dense block: matrices in `Dense.dtype`, what shares an input in one; norms in float32."""

    qkv: torch.Tensor  # [q + 2 kv, hidden]
    o: torch.Tensor  # [hidden, q]
    gate_up: torch.Tensor  # [2 neurons, hidden]
    down: torch.Tensor  # [hidden, neurons]
    input_norm: torch.Tensor  # [hidden]
    ffn_norm: torch.Tensor  # [hidden]
    qkv_bias: torch.Tensor | None = None  # [q + 2 kv], as the matrices


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense model."""

    blocks: tuple[Block, ...]
    embedding: torch.Tensor  # [vocabulary, hidden]
    head: torch.Tensor  # [vocabulary, hidden]; the embedding itself where the two are tied
    norm: torch.Tensor  # [hidden]
    eps: float
    rope: Rope
    heads: int
    kv_heads: int

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its matrices, and of what is multiplied with them."""
        return self.embedding.dtype


def load_dense(model: DenseModel, torch_device: str = "cpu", matrix_dtype: torch.dtype = torch.bfloat16) -> Dense:
    """Read all weights of a checkpoint, a piece at a time."""
    layout, spec = model.layout, model.layout.spec

    def read(*names: str, dtype: torch.dtype = matrix_dtype) -> torch.Tensor:
        spans = [model.checkpoint.span(name) for name in names]
        whole = torch.empty((sum(span.shape[0] for span in spans), *spans[0].shape[1:]), dtype=dtype)
        row = 0
        for name, span in zip(names, spans, strict=True):
            for piece in model.checkpoint.pieces(name):
                whole[row : row + len(piece)] = torch.from_numpy(to_float32(piece, span.dtype))
                row += len(piece)
        return whole.to(torch_device)

    def block(number: int) -> Block:
        names, (gate, up, down) = layout.block(number), ffn_names(number)
        return Block(
            qkv=read(names.query, names.key, names.value),
            o=read(names.output),
            gate_up=read(gate, up),
            down=read(down),
            input_norm=read(names.input_norm, dtype=torch.float32),
            ffn_norm=read(names.post_norm, dtype=torch.float32),
            qkv_bias=None if names.biases is None else read(*names.biases),
        )

    embedding = read(layout.embedding)
    return Dense(
        blocks=tuple(block(number) for number in range(spec.n_blocks)),
        embedding=embedding,
        head=embedding if layout.tied_head else read(layout.head),
        norm=read(layout.final_norm, dtype=torch.float32),
        eps=layout.norm_eps,
        rope=spec.rope,
        heads=spec.n_heads,
        kv_heads=spec.n_kv_heads,
    )


def rope_angles(model: Dense, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary embedding, [tokens, half a head]."""
    frequencies = torch.tensor(model.rope.inv_freq, device=model.device)
    angles = torch.outer(torch.arange(tokens, device=model.device).float(), frequencies)
    scale = model.rope.attention_scaling
    return (angles.cos() * scale).to(model.dtype), (angles.sin() * scale).to(model.dtype)


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Normalise rows [..., hidden] in float32; they come back in `dtype`."""
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


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
    dtype = block.qkv.dtype
    qkv = F.linear(rms_norm(rows, block.input_norm, eps, dtype), block.qkv, block.qkv_bias)
    rows = rows + F.linear(attention(qkv, cos, sin, heads, kv_heads), block.o).float()
    gate, up = F.linear(rms_norm(rows, block.ffn_norm, eps, dtype), block.gate_up).chunk(2, -1)
    return rows + F.linear(F.silu(gate) * up, block.down).float()


def last_hidden(model: Dense, batch: torch.Tensor, block: Callable[..., torch.Tensor] = dense_block) -> torch.Tensor:
    """Return the dense model's normalised last hidden state, [batch, tokens, hidden]."""
    rows = F.embedding(batch, model.embedding).float()
    cos, sin = rope_angles(model, batch.shape[1])
    for weights in model.blocks:
        rows = block(rows, weights, cos, sin, model.eps, model.heads, model.kv_heads)
    return rms_norm(rows, model.norm, model.eps, model.dtype)
