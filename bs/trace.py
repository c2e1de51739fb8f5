"""What the router of a real model said, block by block and token by token: recorded once, simulated as often as one likes.

A trace is an .npz file: `probabilities` float16 [n_blocks, tokens, n_experts], the softmax over all experts; `starts` int64
[questions + 1], where each question begins among the tokens; `counts` int64 [n_blocks, n_experts], how often the model's
own top-k chose each expert; `placement` int64 [n_blocks, n_experts], the first device that holds it in the bundle; from
version 2 on `norms` float32 [n_blocks, n_experts], where the bundle was calibrated on a text: mean norms of the experts'
outputs; and `info`, JSON: `TraceInfo`.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from wdmoe.bs.policies import Sensitivity
from wdmoe.bs.routing import Floats, Ints, Routing, route, softmax
from wdmoe.runtime.errors import DataError
from wdmoe.runtime.outputs import written_whole

if TYPE_CHECKING:
    from wdmoe.bs.station import Station

TRACE_FORMAT, TRACE_VERSION = "wdmoe-trace", 2
_READABLE = (1, TRACE_VERSION)
_SORT_UP_TO = 32  # beyond, sorting whole rows costs more than finding the largest first


class TraceInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a trace comes from."""

    format: str
    version: int
    wdmoe: str
    model: str
    bundle_id: str
    top_k: int
    norm_top_k: bool
    datasets: dict[str, int]  # rows of each
    rows_digests: dict[str, str]  # SHA-256 over them
    sensitivity: dict[str, tuple[Sensitivity, ...]] | None = None  # of each block, by kind of importance, if calibrated


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace; shapes in the module's docstring."""

    info: TraceInfo
    probabilities: npt.NDArray[np.float16]
    starts: Ints
    counts: Ints
    placement: Ints
    norms: Floats | None = None

    @property
    def n_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.probabilities)

    @property
    def n_experts(self) -> int:
        """Experts of a block."""
        return int(self.probabilities.shape[2])

    @property
    def n_questions(self) -> int:
        """Questions, each of which ran as one microbatch."""
        return len(self.starts) - 1

    def sensitivity(self, block: int) -> dict[str, Sensitivity] | None:
        """Return what policies are told of a block, by kind of importance; None: the bundle was not calibrated."""
        known = self.info.sensitivity
        return None if known is None else {kind: blocks[block] for kind, blocks in known.items()}

    def probabilities_of(self, block: int, question: int | None = None) -> Floats:
        """Return what the router said in one block, of one question or of all tokens: [tokens, n_experts]."""
        tokens = slice(None) if question is None else slice(self.starts[question], self.starts[question + 1])
        return self.probabilities[block, tokens].astype(np.float32)

    def routing(self, block: int, question: int | None = None) -> Routing:
        """Return the model's own choice in one block, of one question or of all tokens.

        Float16 has eleven bits: where two experts are closer than one part in two thousand, the other may be chosen.
        """
        probabilities = self.probabilities_of(block, question)
        experts = _largest(probabilities, self.info.top_k)
        weights = np.take_along_axis(probabilities, experts, axis=1)
        if self.info.norm_top_k:
            weights = weights / weights.sum(axis=1, keepdims=True)
        return Routing(experts, weights)


@dataclass(slots=True)
class Recorder:
    """Collects router logits while microbatches run one at a time."""

    n_blocks: int
    top_k: int
    _blocks: list[list[npt.NDArray[np.float16]]] = field(default_factory=list)  # [question][block]
    _counts: list[list[Ints]] = field(default_factory=list)  # [question][block]

    def on_router(self, block: int, logits: Floats) -> None:
        """Take the router's logits of one block of the microbatch that is under way."""
        if block == 0:
            self._blocks.append([])
            self._counts.append([])
        self._blocks[-1].append(softmax(logits).astype(np.float16))
        chosen = route(logits, self.top_k, normalise=False).experts.ravel()
        self._counts[-1].append(np.bincount(chosen, minlength=logits.shape[1]))

    def trace(self, info: TraceInfo, placement: Ints, norms: Floats | None = None) -> Trace:
        """Put together what was recorded.

        Args:
            info: where it comes from.
            placement: the first holder of each expert.
            norms: of the experts' outputs, if known.

        Raises:
            DataError: nothing was.
        """
        whole = [blocks for blocks in self._blocks if len(blocks) == self.n_blocks]
        if not whole:
            raise DataError("nothing was recorded: no question was answered")
        probabilities = np.stack([np.concatenate([blocks[b] for blocks in whole]) for b in range(self.n_blocks)])
        starts = np.cumsum([0, *(len(blocks[0]) for blocks in whole)])
        counts = sum((np.stack(counts) for counts in self._counts if len(counts) == self.n_blocks), start=np.int64(0))
        return Trace(info, probabilities, starts, np.asarray(counts), placement, norms)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace, whole or not at all."""
    info = np.frombuffer(msgspec.json.encode(trace.info), np.uint8)
    optional: dict[str, Any] = {} if trace.norms is None else {"norms": trace.norms}
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            probabilities=trace.probabilities,
            starts=trace.starts,
            counts=trace.counts,
            placement=trace.placement,
            info=info,
            **optional,
        )


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        DataError: the file is none, or of another version; says what is wrong.
    """
    if path.exists() and not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not a trace: no .npz file; make one with wdmoe-bs trace")
    try:
        with np.load(path, allow_pickle=False) as file:
            info = msgspec.json.decode(file["info"].tobytes(), type=TraceInfo)
            arrays = {name: file[name] for name in ("probabilities", "starts", "counts", "placement")}
            norms = file.get("norms")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, msgspec.MsgspecError) as error:
        raise DataError(f"{path} is not a trace ({error}); make one with wdmoe-bs trace") from error
    if info.format != TRACE_FORMAT or info.version not in _READABLE:
        raise DataError(f"{path}: {info.format} version {info.version}, expected {TRACE_FORMAT} 1 to {TRACE_VERSION}")
    trace = Trace(info, **arrays, norms=norms)
    if reason := _misshapen(trace):
        raise DataError(f"{path}: {reason}; make it again with wdmoe-bs trace")
    return trace


def trace_info(station: Station, datasets: dict[str, int], digests: dict[str, str]) -> TraceInfo:
    """Say where a trace comes from.

    Args:
        station: which recorded it.
        datasets: rows of each.
        digests: SHA-256 over them.
    """
    model, known = station.manifest.model, station.pipeline.sensitivity
    return TraceInfo(
        TRACE_FORMAT, TRACE_VERSION, version("wdmoe"), model.name, station.manifest.bundle_id, model.top_k,
        model.norm_top_k, datasets, digests, None if known is None else known.by_importance,
    )  # fmt: skip


def _misshapen(trace: Trace) -> str | None:
    probabilities, starts = trace.probabilities, trace.starts
    if probabilities.ndim != 3 or probabilities.dtype != np.float16:
        return f"probabilities are {probabilities.dtype} {probabilities.shape}, expected float16 of 3 dimensions"
    blocks, tokens, experts = probabilities.shape
    for name, array in (("counts", trace.counts), ("placement", trace.placement)):
        if array.shape != (blocks, experts):
            return f"{name} has shape {array.shape}, expected {(blocks, experts)}"
    if (norms := trace.norms) is not None and (norms.shape != (blocks, experts) or norms.dtype != np.float32):
        return f"norms are {norms.dtype} {norms.shape}, expected float32 {(blocks, experts)}"
    if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) <= 0).any():
        return f"starts do not ascend from 0 to {tokens}"
    if any(len(known) != blocks for known in (trace.info.sensitivity or {}).values()):
        return f"its sensitivity does not speak of {blocks} blocks"
    if not 1 <= trace.info.top_k <= experts:
        return f"top_k is {trace.info.top_k} of {experts} experts"
    return None


def _largest(values: Floats, k: int) -> Ints:
    """Return the k largest of each row, descending; of equals the first, where rows are short."""
    if values.shape[1] <= _SORT_UP_TO:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    some = np.argpartition(-values, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
