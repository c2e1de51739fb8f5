"""Runs a bundle's stages on texts in this process, whoever computes the experts: no device, no link, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wdmoe.runtime.engines import load_engine
from wdmoe.runtime.manifest import BsManifest, DeviceManifest, ExpertEntry
from wdmoe.runtime.sessions import open_session

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Feed = dict[str, npt.NDArray[Any]]
RunExpert = Callable[[int, int, FloatArray], FloatArray]  # block, expert, rows [n, d_model] -> answers [n, d_model]
OnAnswers = Callable[[int, int, IntArray, FloatArray], None]  # block, expert, numbers of the rows [n], answers

ENGINE = "onnxruntime"


class Forward:
    """Texts of N tokens together, block by block; graphs are opened when they are needed, one at a time.

    Args:
        folder: `bs` of the bundle.
        manifest: of it.
        texts: the token ids of each; they do not see each other.
        run_expert: computes a routed expert, called once for each that any text asks for in a block.
        on_answers: told of all that experts answer.
        threads: of the stages.
    """

    def __init__(
        self,
        folder: Path,
        manifest: BsManifest,
        texts: Sequence[IntArray],
        run_expert: RunExpert,
        on_answers: OnAnswers = lambda block, expert, rows, answers: None,
        threads: int = 1,
    ) -> None:
        self._folder, self._manifest, self._run_expert = folder, manifest, run_expert
        self._texts, self._on_answers, self._threads = texts, on_answers, threads
        self._ends = np.cumsum([len(text) for text in texts])[:-1]
        self._attention = {n: _attention_inputs(manifest, n) for n in {len(text) for text in texts}}

    def blocks(self) -> Iterator[FloatArray]:
        """Run block after block; after each, its `residual` and `moe_out` summed: [N, d_model]. The last is the logits."""
        model = self._manifest.model
        feeds: list[Feed] = [{"token_ids": text} for text in self._texts]
        for block in range(model.n_blocks):
            outputs = ["residual_out", "hidden", "router_logits"]
            attended = [feed | self._attention[len(text)] for feed, text in zip(feeds, self._texts, strict=True)]
            residual, hidden, gates = self._run(self._manifest.stages[block], outputs, attended)
            moe_out = self._moe(block, hidden, gates)
            feeds = [{"residual": r, "moe_out": m} for r, m in zip(*map(self._split, (residual, moe_out)), strict=True)]
            yield residual + moe_out
        (hidden,) = self._run(self._manifest.stages[-1], ["hidden"], feeds)
        yield self._run(self._manifest.head, ["logits"], [{"hidden": rows} for rows in self._split(hidden)])[0]

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
            feeds: list[Feed] = [{"hidden": rows} for rows in self._split(hidden)]
            (total,) = self._run(self._manifest.shared[block], ["shared_out"], feeds)
        for expert in np.unique(chosen).tolist():
            rows, slots = np.nonzero(chosen == expert)
            answers = self._run_expert(block, expert, hidden[rows])
            self._on_answers(block, expert, rows, answers)
            total[rows] += answers * weights[rows, slots][:, None]
        return total

    def _run(self, graph: str, outputs: list[str], feeds: Sequence[Feed]) -> list[FloatArray]:
        """Run a graph on each text; the results of all, one below the other."""
        session = open_session(self._folder / graph, self._threads)
        return [
            np.concatenate(results) for results in zip(*(session.run(outputs, feed) for feed in feeds), strict=True)
        ]

    def _split(self, rows: FloatArray) -> list[FloatArray]:
        return np.split(rows, self._ends)


def bundle_experts(bundle: Path, devices: Sequence[DeviceManifest], threads: int = 1, at_once: int = 512) -> RunExpert:
    """Run experts from the graphs of a bundle's device folders, one in memory at a time.

    Args:
        bundle: made by wdmoe-export.
        devices: of it, all of them.
        threads: for one call.
        at_once: rows of a call; more are run in turns.
    """
    where: dict[tuple[int, int], tuple[Path, ExpertEntry]] = {}
    for device in devices:
        folder = bundle / f"device-{device.device}"
        where |= {(entry.block, entry.expert): (folder, entry) for entry in device.experts}

    def run(block: int, expert: int, rows: FloatArray) -> FloatArray:
        folder, entry = where[block, expert]
        engine = load_engine(ENGINE, folder, [entry], threads)
        starts = range(0, len(rows), at_once)
        return np.concatenate([engine.run(block, expert, rows[start : start + at_once]) for start in starts])

    return run


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
