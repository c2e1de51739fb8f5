"""How large the answers of each expert are, and how often it is chosen: from the golden rows, or from a text.

What a token loses with an expert is about gate weight x norm of its answer, so both sides of that product travel with a
bundle. A text goes through the bundle's own stages and experts block by block: one graph is in memory at a time, and of the
text one row a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from wdmoe.export.forward import FloatArray, Forward, IntArray, bundle_experts
from wdmoe.export.inspection import read_bundle
from wdmoe.export.parallel import default_workers
from wdmoe.export.slicing import ExpertFile
from wdmoe.runtime.errors import BundleError
from wdmoe.runtime.manifest import BsManifest, Calibration, write_manifest
from wdmoe.runtime.tokenizing import open_tokenizer

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_TOKENS = 8192
_WINDOW_TOKENS = 512
_CHARACTERS_PER_TOKEN = 16  # read at most: no tokenizer of a language model needs more of a text


def golden_calibration(experts: Sequence[Sequence[ExpertFile]]) -> Calibration:
    """Take the norms from the answers to the golden rows, [block][expert]: random rows, scaled as the block's own."""
    return Calibration("golden", tuple(tuple(_mean_norm(expert.outputs) for expert in row) for row in experts))


def calibrate_bundle(
    bundle: Path,
    texts: Sequence[Path],
    tokens: int = DEFAULT_TOKENS,
    say: Callable[[str], None] = lambda _: None,
    on_block: Callable[[], None] = lambda: None,
) -> Calibration:
    """Run a text through a bundle, and write what was measured into the manifest of its base station.

    Args:
        bundle: made by wdmoe-export, with all of its device folders.
        texts: files in UTF-8; the beginning of each is used, all to the same number of tokens.
        tokens: to be used.
        say: told what is being done.
        on_block: called when a block is done.

    Raises:
        BundleError: it has no tokenizer, a file is missing, or the texts are too short.
        EngineError: ONNX Runtime is not there or refuses a graph.
    """
    found = read_bundle(bundle)
    bs = found.bs
    assert bs is not None
    ids = _token_ids(bundle / "bs", bs, texts, tokens)
    windows, measured = _windows(ids, bs)
    say(f"running {len(ids):,} tokens in {len(windows)} windows through {bs.model.n_blocks} blocks")
    counts, sums = (np.zeros((bs.model.n_blocks, bs.model.n_experts)) for _ in range(2))

    def on_answers(block: int, expert: int, rows: IntArray, answers: FloatArray) -> None:
        kept = measured[rows]
        counts[block, expert] += kept.sum()
        sums[block, expert] += np.linalg.norm(answers[kept].astype(np.float64), axis=1).sum()

    threads = default_workers()
    experts = bundle_experts(bundle, found.devices, threads)
    passing = Forward(bundle / "bs", bs, windows, experts, on_answers, threads).blocks()
    for _ in range(bs.model.n_blocks):  # the head is not needed
        next(passing)
        on_block()
    if not np.isfinite(sums).all():
        raise BundleError(
            f"{bundle}: an expert answers with what is not a number; wdmoe-export verify tells which part"
        )
    # Of an expert that no token chose nothing is known: it counts as one like the others of its block.
    usual = sums.sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
    norms = np.where(counts > 0, sums / np.maximum(counts, 1), usual)
    calibration = Calibration(
        "text",
        norms=tuple(map(tuple, norms.tolist())),
        tokens=int(measured.sum()),
        counts=tuple(map(tuple, counts.astype(int).tolist())),
        tokens_sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
    )
    write_manifest(bundle / "bs", msgspec.structs.replace(bs, calibration=calibration))
    return calibration


def calibration_json(bs: BsManifest) -> dict[str, Any]:
    """Say it for programs, and for `--counts` of a placement."""
    return {"model": bs.model.name, "bundle_id": bs.bundle_id, **msgspec.to_builtins(bs.calibration)}


def calibration_table(calibration: Calibration) -> RenderableType:
    """Lay out a calibration by a text for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("block", "most chosen", "least chosen", "norm: smallest", "median", "largest"):
        table.add_column(name, justify="right")
    for block, (counts, norms) in enumerate(zip(calibration.counts, calibration.norms, strict=True)):
        total, order = sum(counts), sorted(range(len(counts)), key=lambda e: -counts[e])
        ends = [f"{expert} ({counts[expert] / total:.1%})" for expert in (order[0], order[-1])]
        table.add_row(str(block), *ends, *(f"{np.quantile(norms, q):.3g}" for q in (0, 0.5, 1)))
    unused = sum(count == 0 for row in calibration.counts for count in row)
    note = f"{calibration.tokens:,} tokens; the share is of all choices of the block."
    if unused:
        note += f" {unused} experts were chosen by none: more text would tell of them."
    return Group(table, Text(note))


def _token_ids(folder: Path, bs: BsManifest, texts: Sequence[Path], tokens: int) -> IntArray:
    if bs.tokenizer is None:
        raise BundleError(
            f"{folder}: has no tokenizer to read a text with; export a checkpoint that has tokenizer.json"
        )
    tokenizer = open_tokenizer(folder, bs.tokenizer)
    parts: list[int] = []
    for number, path in enumerate(texts):
        share = (tokens - len(parts)) // (len(texts) - number)
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(share * _CHARACTERS_PER_TOKEN)
        parts += tokenizer.encode(text, add_special_tokens=False).ids[:share]
    if len(parts) < 2:
        raise BundleError(f"{', '.join(map(str, texts))}: {len(parts)} tokens of text; give more")
    return np.array(parts, np.int64)


def _windows(ids: IntArray, bs: BsManifest) -> tuple[list[IntArray], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Cut a text into windows, each begun as the model expects; and say which of all rows are measured.

    The first row of a window is not: models put there what they want to attend to when nothing else matters, and answer
    it hundreds of times larger than any other.
    """
    model = bs.model
    first = [] if model.bos_token_id is None else [model.bos_token_id]
    width = min(_WINDOW_TOKENS, model.max_positions) - len(first)
    windows = [np.array([*first, *ids[start : start + width]], np.int64) for start in range(0, len(ids), width)]
    measured = np.concatenate([np.arange(len(window)) > 0 for window in windows])
    return windows, measured


def _mean_norm(answers: FloatArray) -> float:
    norm = float(np.linalg.norm(answers.astype(np.float64), axis=1).mean())
    return norm if np.isfinite(norm) else 0.0  # no device passes its self-check with such an expert
