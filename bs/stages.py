"""The base station's own part of the model: embedding, attention, router, shared experts and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wdmoe.bs.config import StagesOn
from wdmoe.bs.dispatch import Packed, PackedRows, Partial, combine
from wdmoe.bs.microbatch import KvCache, Microbatch, Result
from wdmoe.bs.routing import Floats, Ints, Routing, route
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import BsManifest, Rope
from wdmoe.runtime.messages import Wire, pack_rows
from wdmoe.runtime.sessions import open_session

OnStation = Any  # what only the stages look into: arrays, or tensors that stay on a GPU

_HEAD_ROWS = 128  # rows of the head at once: the logits of a long text would not fit in memory


@dataclass(frozen=True, slots=True)
class Attended:
    """What a stage leaves behind it."""

    residual: Floats  # [n, d_model]
    hidden: Floats  # [n, d_model], normed: what router and experts see
    router_logits: Floats  # [n, n_experts]


@dataclass(frozen=True, slots=True)
class Routed:
    """What a stage tells the host, and what stays where the stages are."""

    residual: OnStation  # [n, d_model]
    hidden: OnStation  # [n, d_model]
    router_logits: Floats  # [n, n_experts]
    routing: Routing
    packed: Packed  # the hidden rows as they travel


class StationStages(Protocol):
    """The stages of a model on one kind of processor; those on a GPU belong to one thread at a time."""

    on: str  # cpu or cuda

    def prepare(self, microbatch: Microbatch) -> OnStation:
        """Make what every stage of a microbatch takes."""
        ...

    def attend(
        self, block: int, microbatch: Microbatch, prepared: OnStation, residual: OnStation, moe_out: OnStation
    ) -> OnStation:
        """Run the stage of a block; residual and moe_out of the block before are None at block 0."""
        ...

    def route(self, attended: OnStation, owner: Ints, n_devices: int, wire: Wire) -> Routed:
        """Make the model's own choice of experts, and pack the rows.

        Args:
            attended: what `attend` returned.
            owner: [n_experts], the device of each expert.
            n_devices: how many there are.
            wire: precision of the rows on the wire.
        """
        ...

    def combine(
        self, n_rows: int, partials: Sequence[Partial], lost_share: Floats | None, shared: OnStation
    ) -> OnStation:
        """Take the devices' sums, in the order given, for the next stage; see `dispatch.combine`."""
        ...

    def shared(self, block: int, hidden: OnStation) -> OnStation:
        """Run the shared expert of a block: [n, d_model] -> [n, d_model]."""
        ...

    def finish(self, microbatch: Microbatch, residual: OnStation, moe_out: OnStation) -> Result:
        """Run the last stage and the head on the rows that are asked for."""
        ...

    def on_host(self, hidden: OnStation) -> Floats:
        """Return rows [n, d_model] where numpy can read them."""
        ...


def open_stages(
    folder: Path, manifest: BsManifest, threads: int, stages_on: StagesOn, say: Callable[[str], None]
) -> StationStages:
    """Load the stages of a bundle.

    Args:
        folder: of the base station.
        manifest: its manifest.
        threads: of the CPU, for one call.
        stages_on: auto takes a GPU where there is one and all that it needs.
        say: told where they are, unless it is the CPU because nothing else was asked for.

    Raises:
        EngineError: something that they need is missing.
    """
    if stages_on != "cpu":
        try:
            from wdmoe.bs.cuda import open_cuda_stages

            stages = open_cuda_stages(folder, manifest)
        except EngineError as error:
            if stages_on == "cuda":
                raise
            say(f"stages on the CPU; {error}")
        else:
            say("stages on cuda")
            return stages
    return Stages(folder, manifest, threads)


class Stages:
    """The stages of a bundle on the CPU, in ONNX Runtime."""

    on = "cpu"

    def __init__(self, folder: Path, manifest: BsManifest, threads: int) -> None:
        try:
            self._stages = [open_session(folder / name, threads) for name in manifest.stages]
            self._shared = [open_session(folder / name, threads) for name in manifest.shared]
            self._head = open_session(folder / manifest.head, threads)
        except ImportError as error:
            raise EngineError(f"the base station needs ONNX Runtime ({error}): pip install 'wdmoe[bs,cpu]'") from error
        self._model = manifest.model

    def prepare(self, microbatch: Microbatch) -> tuple[Floats, Floats]:
        """Return cos and sin of its positions, each [n, head_dim / 2]."""
        return rope_angles(self._model.rope, microbatch.positions)

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

    def route(self, attended: Attended, owner: Ints, n_devices: int, wire: Wire) -> Routed:
        """Make the model's own choice of experts, and pack the rows, once for all devices."""
        routing = route(attended.router_logits, self._model.top_k, self._model.norm_top_k)
        packed = PackedRows(*pack_rows(attended.hidden, wire))
        return Routed(attended.residual, attended.hidden, attended.router_logits, routing, packed)

    def combine(
        self, n_rows: int, partials: Sequence[Partial], lost_share: Floats | None, shared: Floats | None
    ) -> Floats:
        """Add the devices' sums up: [n_rows, d_model]."""
        return combine(n_rows, self._model.d_model, partials, lost_share, shared)

    def on_host(self, hidden: Floats) -> Floats:
        """Return the rows: they are there."""
        return hidden

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

        def logits_of(rows: Ints) -> Floats:
            (logits,) = self._head.run(["logits"], {"hidden": hidden[rows]})
            result: Floats = logits
            return result

        return head_result(microbatch, logits_of)


def head_result(microbatch: Microbatch, logits_of: Callable[[Ints], Floats]) -> Result:
    """Ask the head for what a microbatch wants, some rows at a time.

    Args:
        microbatch: says which rows and targets.
        logits_of: runs the head: rows of the microbatch [m] -> logits [m, vocab].
    """
    rows, targets = microbatch.target_rows, microbatch.target_ids
    logprobs, greedy = np.empty(len(targets), np.float32), np.empty(len(targets), np.bool_)
    kept: list[Floats] = []
    for start in range(0, len(microbatch.head_rows), _HEAD_ROWS):
        asked = microbatch.head_rows[start : start + _HEAD_ROWS]
        logits = logits_of(asked)
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
    best = logits.argmax(axis=1)
    largest = logits[np.arange(len(logits)), best]
    sums = np.empty(len(logits), np.float32)
    scratch = np.empty(
        logits.shape[1], np.float32
    )  # one for all rows: a new one each time is mapped and cleared each time
    for row, values in enumerate(logits):
        np.subtract(values, largest[row], out=scratch)
        sums[row] = np.exp(scratch, out=scratch).sum()
    log_sum: Floats = np.log(sums) + largest
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
