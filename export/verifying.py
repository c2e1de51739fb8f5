"""Holds a bundle against the checkpoint it was made of: base station, some experts, and a text through all of it.

The original is computed in float32 from the checkpoint's weights as they come by, the bundle's side by ONNX Runtime from
the graphs that a device would run; no more than one expert is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wdmoe.export.bundle import layout_of
from wdmoe.export.checkpoint import Checkpoint, open_checkpoint, read_pieces
from wdmoe.export.conversion import Losses, to_float32
from wdmoe.export.families import ModelLayout
from wdmoe.export.forward import FloatArray, Forward, IntArray, RunExpert, bundle_experts
from wdmoe.export.inspection import read_bundle
from wdmoe.export.slicing import answers_of, golden_rows
from wdmoe.export.station import weight_files
from wdmoe.export.weights import Part
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import BsManifest, Precision, StagePrecision
from wdmoe.runtime.tensor_file import read_spans
from wdmoe.runtime.tokenizing import open_tokenizer

if TYPE_CHECKING:
    from rich.console import RenderableType

_SEED = 20251123
_TEXT = (
    "The base station keeps what every token needs, and the devices keep what few of them need. A token asks for two "
    "of eight experts; where it is sent depends on what it says, on how fast each device answers, and on the air "
    "between them. In the evening, when the kettle boils and everybody streams a film, the air is full and a wise "
    "scheduler sends less. Water boils at 100 degrees; paper burns at 233; nobody knows what silence weighs."
)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a precision may cost."""

    rms: float  # of an expert's answers, relative; float32 stages must be equal
    divergence: float  # mean KL over the text, nats


# Twice and more what the small model shows (int8 0.013 and 0.004, int4 0.17 and 0.05): beyond, something is wrong.
BOUNDS: dict[Precision, Bound] = {
    "fp32": Bound(1e-5, 1e-6),
    "fp16": Bound(2e-3, 1e-3),
    "int8": Bound(0.04, 0.015),
    "int4": Bound(0.35, 0.2),
}
_STAGE_RMS: dict[StagePrecision, float] = {"fp32": 0.0, "fp16": 2.0**-11}  # half of the last place of a float16


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of the bundle against the original."""

    name: str
    largest: float  # error, relative to the largest value of the original
    rms: float  # root mean square of the error over that of the original
    bound: float | None = None  # of `rms`

    @property
    def passed(self) -> bool:
        """Whether it is within its bound; an error that is not a number is not."""
        return self.bound is None or self.rms <= self.bound


@dataclass(frozen=True, slots=True)
class TextErrors:
    """A text through the whole model, with the experts of the bundle and with those of the original.

    The stages are the bundle's both times: their weights are compared by themselves.
    """

    tokens: int
    blocks: tuple[Piece, ...]  # what comes out of each block, the errors of those before included
    logits: Piece
    divergence: float  # mean KL(original || bundle) of the next token, nats
    same_choice: float  # share of tokens after which the most likely one is the same
    bound: float  # of the divergence

    @property
    def passed(self) -> bool:
        """Whether the divergence is within its bound."""
        return self.divergence <= self.bound


@dataclass(frozen=True, slots=True)
class Verification:
    """All that was compared."""

    bundle_id: str
    precision: Precision
    station: tuple[Piece, ...]  # weight files
    experts: tuple[Piece, ...]
    text: TextErrors

    @property
    def passed(self) -> bool:
        """Whether everything is within its bound."""
        return all(piece.passed for piece in (*self.station, *self.experts)) and self.text.passed

    def as_json(self) -> dict[str, Any]:
        """Say the same for programs; what is not finite is null."""
        plain: dict[str, Any] = _plain(asdict(self) | {"passed": self.passed, "rms_of_experts": self.rms_of_experts})
        return plain

    @property
    def rms_of_experts(self) -> float:
        """Root mean square over the experts of their relative errors."""
        return math.sqrt(sum(piece.rms**2 for piece in self.experts) / len(self.experts))


def verify_bundle(
    bundle: Path,
    folder: Path,
    *,
    experts: int = 16,
    tokens: int = 48,
    bound: Bound | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Compare a bundle with its checkpoint.

    Args:
        bundle: made by wdmoe-export, with all of its device folders.
        folder: of the checkpoint.
        experts: how many to compare one by one, spread over the model; the text uses whatever it is routed to.
        tokens: of the text.
        bound: in place of the precision's own.
        say: told what is being done.

    Raises:
        BundleError: the bundle was made of another checkpoint, or a file is missing.
        EngineError: ONNX Runtime is not there or refuses a graph.
    """
    found = read_bundle(bundle)
    bs = found.bs
    assert bs is not None
    checkpoint = open_checkpoint(folder)
    if checkpoint.source_sha256 != bs.source.checkpoint_sha256:
        raise BundleError(
            f"{bundle}: made of a checkpoint with the hash {bs.source.checkpoint_sha256}, that of {folder} is "
            f"{checkpoint.source_sha256}; give the one it was made of with --model"
        )
    layout, bound = layout_of(checkpoint, bs.model.name), bound or BOUNDS[bs.precision]
    say("comparing the weights of the base station")
    station = tuple(
        _station_piece(bundle / "bs" / name, parts, checkpoint, _STAGE_RMS[bs.stage_precision])
        for name, parts in weight_files(layout).items()
    )
    original, exported = _original(checkpoint, layout), bundle_experts(bundle, found.devices)
    say(f"comparing {experts} experts")
    compared: list[Piece] = []
    for block, expert in _sample(bs, experts):
        rows = golden_rows(checkpoint, layout.block(block).post_norm, bs.model.d_model, block)
        name = f"block {block}, expert {expert}"
        compared.append(_piece(name, exported(block, expert, rows), original(block, expert, rows), bound.rms))
    ids = _token_ids(bundle / "bs", bs, tokens)
    say(f"running a text of {len(ids)} tokens, twice")
    passes = (Forward(bundle / "bs", bs, [ids], run).blocks() for run in (exported, original))
    *blocks, (logits, exact) = zip(*passes, strict=True)
    text = TextErrors(
        len(ids),
        tuple(_piece(f"block {number}", *pair) for number, pair in enumerate(blocks)),
        _piece("logits", logits, exact),
        _mean_divergence(exact, logits),
        float((logits.argmax(axis=1) == exact.argmax(axis=1)).mean()),
        bound.divergence,
    )
    return Verification(bs.bundle_id, bs.precision, station, tuple(compared), text)


def verification_table(found: Verification) -> RenderableType:
    """Lay out a verification for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("piece", "largest error", "RMS error", "bound", ""):
        table.add_column(name, justify="left" if name in ("piece", "") else "right")
    worst = max(found.station, key=lambda piece: piece.rms)
    shown = [Piece(f"bs, {len(found.station)} files", worst.largest, worst.rms, worst.bound), *found.experts]
    shown += [*found.text.blocks, found.text.logits]
    for piece in shown:
        bound = "-" if piece.bound is None else f"{piece.bound:.1e}"
        table.add_row(
            piece.name, f"{piece.largest:.1e}", f"{piece.rms:.1e}", bound, "" if piece.passed else "beyond the bound"
        )
    text = found.text
    experts = f"Experts {found.precision}: RMS error {found.rms_of_experts:.2e} over {len(found.experts)} experts."
    whole = (
        f"Blocks and logits: a text of {text.tokens} tokens through the bundle's stages, with its experts and with the "
        "checkpoint's, the errors of all blocks before included; stages themselves are compared by their weights. KL "
        f"{text.divergence:.2e} nats a token (bound {text.bound:.1e}), same most likely token {text.same_choice:.0%}."
    )
    return Group(table, Text(experts), Text(whole))


def _station_piece(path: Path, parts: tuple[Part, ...], checkpoint: Checkpoint, bound: float) -> Piece:
    spans = read_spans(path)
    losses = Losses()
    for part in parts:
        stored = read_pieces(path, spans[part.name])
        left = next(stored)
        for name, _ in part.sources:
            dtype = checkpoint.span(name).dtype
            for raw in checkpoint.pieces(name):
                exact, at = to_float32(raw, dtype), 0
                while at < len(exact):  # pieces of a part of several tensors do not begin where theirs do
                    if not len(left):
                        left = next(stored)
                    count = min(len(left), len(exact) - at)
                    losses.add_error(left[:count], exact[at : at + count])
                    left, at = left[count:], at + count
    return Piece(path.name, losses.largest_error, losses.rms_error, bound)


def _original(checkpoint: Checkpoint, layout: ModelLayout) -> RunExpert:
    def run(block: int, expert: int, rows: FloatArray) -> FloatArray:
        names = layout.expert(block, expert)
        weights = (
            (to_float32(piece, checkpoint.span(name).dtype) for piece in checkpoint.pieces(name))
            for name in (names.gate, names.up, names.down)
        )
        return answers_of(rows, *weights)

    return run


def _sample(bs: BsManifest, count: int) -> list[tuple[int, int]]:
    """Draw experts, the same at every call, as evenly over the blocks as can be."""
    model, rng = bs.model, np.random.default_rng(_SEED)
    count = min(count, model.n_blocks * model.n_experts)
    orders = [rng.permutation(model.n_experts).tolist() for _ in range(model.n_blocks)]
    blocks = np.linspace(0, model.n_blocks, min(count, model.n_blocks), endpoint=False).astype(int).tolist()
    drawn = [(block, orders[block][turn]) for turn in range(model.n_experts) for block in blocks]
    rest = [(block, expert) for block in range(model.n_blocks) for expert in orders[block]]
    return sorted(list(dict.fromkeys([*drawn, *rest]))[:count])


def _token_ids(folder: Path, bs: BsManifest, tokens: int) -> IntArray:
    """Take a text in the model's own tokens; random ones where the bundle has no tokenizer."""
    tokens = min(tokens, bs.model.max_positions)
    if bs.tokenizer is None:
        return np.random.default_rng(_SEED).integers(0, bs.model.vocab_size, tokens)
    ids = open_tokenizer(folder, bs.tokenizer).encode(_TEXT, add_special_tokens=False).ids
    return np.array(ids[:tokens], np.int64)


def _piece(name: str, found: FloatArray, exact: FloatArray, bound: float | None = None) -> Piece:
    losses = Losses()
    losses.add_error(found, exact)
    return Piece(name, losses.largest_error, losses.rms_error, bound)


def _mean_divergence(exact: FloatArray, other: FloatArray) -> float:
    p, q = (_log_softmax(logits) for logits in (exact, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def _log_softmax(logits: FloatArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray[Any, np.dtype[np.float64]] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
