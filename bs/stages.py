"""The base station's own part of the model: embedding, attention, router, shared experts and head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wdmoe.bs.microbatch import KvCache, Microbatch, Result
from wdmoe.bs.routing import Floats, Ints
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import BsManifest, Rope
from wdmoe.runtime.sessions import open_session

_HEAD_ROWS = 128  # rows of the head at once: the logits of a long text would not fit in memory
_SUM_ROWS = 8  # rows of logits at once: what is made of them should stay in the cache


@dataclass(frozen=True, slots=True)
class Attended:
    """What a stage leaves behind it."""

    residual: Floats  # [n, d_model]
    hidden: Floats  # [n, d_model], normed: what router and experts see
    router_logits: Floats  # [n, n_experts]


class Stages:
    """The stages of a bundle, in ONNX Runtime; belongs to one thread at a time."""

    def __init__(self, folder: Path, manifest: BsManifest, threads: int) -> None:
        try:
            self._stages = [open_session(folder / name, threads) for name in manifest.stages]
            self._shared = [open_session(folder / name, threads) for name in manifest.shared]
            self._head = open_session(folder / manifest.head, threads)
        except ImportError as error:
            raise EngineError(f"the base station needs ONNX Runtime ({error}): pip install 'wdmoe[bs,cpu]'") from error
        self._model = manifest.model

    def attend(
        self,
        block: int,
        microbatch: Microbatch,
        angles: tuple[Floats, Floats],
        residual: Floats | None,
        moe_out: Floats | None,
    ) -> Attended:
        """Run stage `block`: combine what came before, attention, router.

        Args:
            block: 0 .. n_blocks - 1.
            microbatch: its lanes and mask, and its tokens at block 0.
            angles: cos and sin of its positions, each [n, head_dim / 2].
            residual: of the block before; None at block 0.
            moe_out: sum of the experts of the block before, [n, d_model]; None at block 0.
        """
        cache = microbatch.cache
        if cache is None:
            past_key = past_value = np.empty((len(microbatch.lanes), 0, self._model.kv_dim), np.float32)
        else:
            past_key, past_value = (past[None] for past in cache.past(block))
        inputs: dict[str, Floats | Ints] = {
            "cos": angles[0],
            "sin": angles[1],
            "past_key": past_key,
            "past_value": past_value,
            "mask": microbatch.mask,
            "lanes": microbatch.lanes,
            "back": microbatch.back,
        }
        if block == 0:
            inputs["token_ids"] = microbatch.token_ids
        else:
            assert residual is not None and moe_out is not None
            inputs |= {"residual": residual, "moe_out": moe_out}
        outputs = ["residual_out", "hidden", "router_logits"]
        if cache is None:
            return Attended(*self._stages[block].run(outputs, inputs))
        *attended, keys, values = self._stages[block].run([*outputs, "new_key", "new_value"], inputs)
        cache.store(block, keys, values)
        return Attended(*attended)

    def shared(self, block: int, hidden: Floats) -> Floats:
        """Run the shared expert of a block: [n, d_model] -> [n, d_model]."""
        (out,) = self._shared[block].run(["shared_out"], {"hidden": hidden})
        result: Floats = out
        return result

    def finish(self, microbatch: Microbatch, residual: Floats, moe_out: Floats) -> Result:
        """Run the last stage and the head on the rows that are asked for."""
        (hidden,) = self._stages[-1].run(["hidden"], {"residual": residual, "moe_out": moe_out})
        if microbatch.cache is not None:
            microbatch.cache.advance(len(microbatch.token_ids))
        rows, targets = microbatch.target_rows, microbatch.target_ids
        logprobs, greedy = np.empty(len(targets), np.float32), np.empty(len(targets), np.bool_)
        kept: list[Floats] = []
        for start in range(0, len(microbatch.head_rows), _HEAD_ROWS):
            asked = microbatch.head_rows[start : start + _HEAD_ROWS]
            (logits,) = self._head.run(["logits"], {"hidden": hidden[asked]})
            if len(targets):
                best, log_sum = best_and_log_sum(logits)
                here = np.flatnonzero((rows >= start) & (rows < start + len(asked)))
                local = rows[here] - start
                logprobs[here] = logits[local, targets[here]] - log_sum[local]
                greedy[here] = best[local] == targets[here]
            if microbatch.want_logits:
                kept.append(logits)
        return Result(logprobs, greedy, np.concatenate(kept) if kept else None)


def best_and_log_sum(logits: Floats) -> tuple[Ints, Floats]:
    """Return each row's most likely token, and the logarithm of the sum of its exponentials: [m] each.

    numpy adds pairwise and stays within 1e-6 over 49,152 tokens; ONNX Runtime's LogSoftmax and ReduceLogSumExp are off
    by 1e-5 and 1e-4 there, to one side, which an answer of forty tokens adds up.
    """
    best, log_sum = np.empty(len(logits), np.int64), np.empty(len(logits), np.float32)
    for start in range(0, len(logits), _SUM_ROWS):
        part = slice(start, start + _SUM_ROWS)
        best[part] = logits[part].argmax(axis=1)
        largest = np.take_along_axis(logits[part], best[part, None], axis=1)
        log_sum[part] = np.log(np.exp(logits[part] - largest).sum(axis=1)) + largest[:, 0]
    return best, log_sum


def rope_angles(rope: Rope, positions: Ints) -> tuple[Floats, Floats]:
    """Return cos and sin of each position's rotation, each [n, head_dim / 2] float32, computed as transformers does."""
    angles = positions.astype(np.float32)[:, None] * np.array(rope.inv_freq, np.float32)[None, :]
    scale = np.float32(rope.attention_scaling)
    return np.cos(angles) * scale, np.sin(angles) * scale


def new_cache(manifest: BsManifest, tokens: int) -> KvCache:
    """Make room for a sequence of `tokens` tokens."""
    model = manifest.model
    if tokens > model.max_positions:
        raise ValueError(f"{tokens} tokens, but {model.name} knows {model.max_positions} positions")
    return KvCache(model.n_blocks, model.kv_dim, tokens)
