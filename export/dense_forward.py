"""The forward pass of a dense decoder of the Llama family in numpy, one block at a time, float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from wdmoe.export.carve import FfnWeights, FloatArray
from wdmoe.export.dense import DenseModel

# Largest array of a feed-forward pass, [tokens, neurons]; a few of this size are alive at a time.
_PIECE_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """The half of a block that stays as it is."""

    norm: FloatArray  # [d_model]
    query: FloatArray  # [n_heads x head_dim, d_model]
    key: FloatArray  # [n_kv_heads x head_dim, d_model]
    value: FloatArray  # [n_kv_heads x head_dim, d_model]
    output: FloatArray  # [d_model, n_heads x head_dim]
    biases: tuple[FloatArray, ...] | None  # of query, key and value


@final
class Attention:
    """Attention of one block over texts of at most `n_tokens` tokens."""

    def __init__(self, model: DenseModel, block: int, n_tokens: int) -> None:
        names = model.layout.block(block)
        self._weights = AttentionWeights(
            norm=model.matrix(names.input_norm),
            query=model.matrix(names.query),
            key=model.matrix(names.key),
            value=model.matrix(names.value),
            output=model.matrix(names.output),
            biases=None if names.biases is None else tuple(model.matrix(name) for name in names.biases),
        )
        spec = self._spec = model.layout.spec
        self._eps = model.layout.norm_eps
        angles = np.arange(n_tokens, dtype=np.float32)[:, None] * np.array(spec.rope.inv_freq, np.float32)
        scale = np.float32(spec.rope.attention_scaling)
        self._cos, self._sin = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
        self._later = np.triu(np.full((n_tokens, n_tokens), -np.inf, np.float32), k=1)

    def __call__(self, residual: FloatArray) -> FloatArray:
        """Return what attention adds to the residual [tokens, d_model] of one text."""
        spec, weights, n_tokens = self._spec, self._weights, len(residual)
        rows = rms_norm(residual, weights.norm, self._eps)
        query, key, value = (rows @ weight.T for weight in (weights.query, weights.key, weights.value))
        if weights.biases is not None:
            query, key, value = (x + bias for x, bias in zip((query, key, value), weights.biases, strict=True))
        groups = spec.n_heads // spec.n_kv_heads
        # [n_kv_heads, heads that share a key, tokens, head_dim]
        query = self._rotate(query).reshape(n_tokens, spec.n_kv_heads, groups, -1).transpose(1, 2, 0, 3)
        key = self._rotate(key).transpose(1, 2, 0)[:, None]
        value = value.reshape(n_tokens, spec.n_kv_heads, -1).transpose(1, 0, 2)[:, None]
        scores = query @ key
        scores *= np.float32(spec.head_dim**-0.5)
        scores += self._later[:n_tokens, :n_tokens]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        attended: FloatArray = (scores @ value).transpose(2, 0, 1, 3).reshape(n_tokens, -1) @ weights.output.T
        return attended

    def _rotate(self, rows: FloatArray) -> FloatArray:
        """Turn [tokens, heads x head_dim] by position; returns [tokens, heads, head_dim]."""
        heads = rows.reshape(len(rows), -1, self._spec.head_dim)
        first, second = np.split(heads, 2, axis=-1)
        cos, sin = self._cos[: len(rows)], self._sin[: len(rows)]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(rows: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """Norm rows [tokens, d_model]."""
    result: FloatArray = rows / np.sqrt(np.mean(rows * rows, axis=-1, keepdims=True) + np.float32(eps)) * weight
    return result


def pieces_of(n_rows: int, neurons: int) -> Iterator[slice]:
    """Cut rows so that an array of [rows, neurons] stays small."""
    at_once = max(1, _PIECE_BYTES // (4 * neurons))
    for start in range(0, n_rows, at_once):
        yield slice(start, min(start + at_once, n_rows))


def add_feed_forward(residual: FloatArray, norm: FloatArray, eps: float, weights: FfnWeights) -> None:
    """Add to the residual [tokens, d_model], in place, what the feed-forward makes of its norm."""
    for piece in pieces_of(len(residual), len(weights.gate)):
        residual[piece] += weights.activations(rms_norm(residual[piece], norm, eps)) @ weights.down.T
