"""Runs a bundle's stages on one text in this process, whoever computes the experts: no device, no link, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.manifest import BsManifest
from wdmoe.runtime.sessions import open_session

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Feed = dict[str, npt.NDArray[Any]]
RunExpert = Callable[[int, int, FloatArray], FloatArray]  # block, expert, rows [n, d_model] -> answers [n, d_model]


class Forward:
    """One text of N tokens, block by block; graphs are opened when they are needed, one at a time.

    Args:
        folder: `bs` of the bundle.
        manifest: of it.
        token_ids: of the text.
        run_expert: computes a routed expert.
    """

    def __init__(self, folder: Path, manifest: BsManifest, token_ids: IntArray, run_expert: RunExpert) -> None:
        self._folder, self._manifest, self._run_expert = folder, manifest, run_expert
        self._token_ids = token_ids
        self._attention = _attention_inputs(manifest, len(token_ids))

    def blocks(self) -> Iterator[FloatArray]:
        """Run block after block; after each, its `residual` and `moe_out` summed: [N, d_model]. The last is the logits."""
        model = self._manifest.model
        feed: Feed = {"token_ids": self._token_ids}
        for block in range(model.n_blocks):
            outputs = ["residual_out", "hidden", "router_logits"]
            residual, hidden, gates = self._run(self._manifest.stages[block], outputs, feed | self._attention)
            moe_out = self._moe(block, hidden, gates)
            feed = {"residual": residual, "moe_out": moe_out}
            yield residual + moe_out
        (hidden,) = self._run(self._manifest.stages[-1], ["hidden"], feed)
        yield self._run(self._manifest.head, ["logits"], {"hidden": hidden})[0]

    def _moe(self, block: int, hidden: FloatArray, router_logits: FloatArray) -> FloatArray:
        model = self._manifest.model
        gates = np.exp(router_logits - router_logits.max(axis=1, keepdims=True))
        gates /= gates.sum(axis=1, keepdims=True)
        chosen = np.argsort(-gates, axis=1, kind="stable")[:, : model.top_k]
        weights = np.take_along_axis(gates, chosen, axis=1)
        if model.norm_top_k:
            weights /= weights.sum(axis=1, keepdims=True)
        total = np.zeros_like(hidden)
        if model.shared_expert:
            (total,) = self._run(self._manifest.shared[block], ["shared_out"], {"hidden": hidden})
        for expert in np.unique(chosen).tolist():
            rows, slots = np.nonzero(chosen == expert)
            total[rows] += self._run_expert(block, expert, hidden[rows]) * weights[rows, slots][:, None]
        return total

    def _run(self, graph: str, outputs: list[str], feed: Feed) -> list[FloatArray]:
        results: list[FloatArray] = open_session(self._folder / graph, 1).run(outputs, feed)
        return results


def _attention_inputs(manifest: BsManifest, n_tokens: int) -> Feed:
    """Lay out one lane without a past; see docs/bundle-format.md."""
    model, positions = manifest.model, np.arange(n_tokens)
    angles = positions.astype(np.float32)[:, None] * np.array(model.rope.inv_freq, np.float32)
    scale = np.float32(model.rope.attention_scaling)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (model.sliding_window or n_tokens))
    past = np.empty((1, 0, model.kv_dim), np.float32)
    return {
        "cos": np.cos(angles) * scale,
        "sin": np.sin(angles) * scale,
        "past_key": past,
        "past_value": past,
        "mask": np.where(seen, np.float32(0), np.float32(-np.inf))[None, None],
        "lanes": positions[None],
        "back": positions,
    }
