"""Calibration text: windows of tokens, spread evenly over some files, of which only the stretches used are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wdmoe.export.checkpoint import Checkpoint
from wdmoe.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IntArray = npt.NDArray[np.int64]

TOKENIZER_NAME = "tokenizer.json"
# Read for each token of a window; English takes 4 to 5. A stretch that gives too few tokens is left out.
_BYTES_PER_TOKEN = 8
_HELD_OUT_EVERY = 8  # one window in so many is kept to judge by
# Of an end-to-end distillation: windows to plan by, to fit by and to judge by; all others are to train on.
_PLAN_WINDOWS = _FIT_WINDOWS = _JUDGE_WINDOWS = 32
_TOKENS_PER_EXPERT = 16  # in the windows that are planned by, at least


@dataclass(frozen=True, slots=True)
class Windows:
    """Texts of one length in the model's tokens, [windows, tokens]."""

    token_ids: IntArray

    @property
    def held_out(self) -> npt.NDArray[np.bool_]:
        """Which windows nothing is fitted on, [windows]; the last at least."""
        number = np.arange(len(self.token_ids))
        kept: npt.NDArray[np.bool_] = (number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) | (number == number[-1])
        return kept


@dataclass(frozen=True, slots=True)
class Split:
    """Windows by what they serve, [windows, tokens] each."""

    plan: IntArray
    fit: IntArray
    train: IntArray  # shuffled
    held_out: IntArray


def windows_wanted(steps: int, batch: int) -> int:
    """Return how many windows an end-to-end distillation reads if no text is read twice."""
    return _PLAN_WINDOWS + _FIT_WINDOWS + _JUDGE_WINDOWS + steps * batch


def split_windows(windows: Windows, seed: int, experts: int) -> Split:
    """Deal windows out for an end-to-end distillation; of few, a quarter each to plan by and to fit by.

    Raises:
        CheckpointError: there are too few; names the remedy.
    """
    held_out = np.flatnonzero(windows.held_out)
    judged = held_out[np.linspace(0, len(held_out), min(len(held_out), _JUDGE_WINDOWS), endpoint=False).astype(int)]
    rest = np.setdiff1d(np.arange(len(windows.token_ids)), judged)
    rest = np.random.default_rng(seed).permutation(rest)
    plan = min(_PLAN_WINDOWS, len(rest) // 4)
    fit = plan + min(_FIT_WINDOWS, len(rest) // 4)
    tokens = plan * windows.token_ids.shape[1]
    if tokens < (needed := _TOKENS_PER_EXPERT * experts):
        raise CheckpointError(
            f"the calibration text leaves {tokens} tokens to plan {experts} experts by, and training more; at least "
            f"{needed} are needed: add files to --calibration, or raise --tokens"
        )
    ids = windows.token_ids
    return Split(ids[rest[:plan]], ids[rest[plan:fit]], ids[rest[fit:]], ids[judged])


def calibration_windows(checkpoint: Checkpoint, files: Sequence[Path], n_tokens: int, window: int) -> Windows:
    """Cut windows out of text files, in the words of the checkpoint's own tokenizer.

    Each window begins as the tokenizer begins a text (with a BOS token, for one).

    Args:
        checkpoint: with a tokenizer.json.
        files: of UTF-8 text.
        n_tokens: wanted in all; short files give fewer.
        window: tokens of a window.

    Raises:
        CheckpointError: there is no tokenizer, or too little text; names the remedy.
    """
    tokenizer = _open_tokenizer(checkpoint)
    begin = tokenizer.encode("").ids
    if len(begin) >= window:
        raise CheckpointError(f"a window of {window} tokens has no room for text; give a larger --window")
    wanted, at_once = max(2, n_tokens // window), window - len(begin)
    found: list[list[int]] = []
    for text, most in _texts(files, wanted, window * _BYTES_PER_TOKEN):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        starts = range(0, len(ids) - at_once + 1, at_once)[:most]
        found += [[*begin, *ids[start : start + at_once]] for start in starts]
    if len(found) < 2:
        raise CheckpointError(
            f"the calibration text gives {len(found)} windows of {window} tokens; at least 2 are needed, and some 30 "
            "are better: add files to --calibration, or give a smaller --window"
        )
    spread = np.linspace(0, len(found), min(wanted, len(found)), endpoint=False).astype(int)
    token_ids = np.array(found, np.int64)[spread]
    if (largest := int(token_ids.max())) >= (vocab := int(checkpoint.config["vocab_size"])):
        raise CheckpointError(
            f"{checkpoint.folder / TOKENIZER_NAME}: makes token {largest}, config.json has vocab_size {vocab}; "
            "the two are not of the same model"
        )
    return Windows(token_ids)


def calibration_files(paths: Sequence[Path]) -> list[Path]:
    """List text files; a folder stands for its *.txt.

    Raises:
        CheckpointError: a folder has none, or a file is empty.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise CheckpointError(f"{path}: has no *.txt; give text files, or a folder of them, with --calibration")
        files += inside
    for file in files:
        if not file.stat().st_size:
            raise CheckpointError(f"{file}: is empty; give another file with --calibration")
    return files


def _open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    from tokenizers import Tokenizer

    path = checkpoint.folder / TOKENIZER_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing, and the calibration text needs it; make it once with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises plain Exception
        raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error


def _texts(files: Sequence[Path], wanted: int, stretch_bytes: int) -> Iterator[tuple[str, int | None]]:
    """Give stretches evenly spaced over all files, one window to be taken of each; short files whole, for all of theirs."""
    sizes_bytes = [path.stat().st_size for path in files]
    if sum(sizes_bytes) < wanted * stretch_bytes:
        for path in files:
            yield path.read_text(encoding="utf-8", errors="ignore"), None
        return
    ends_bytes = np.cumsum(sizes_bytes)
    for number in range(wanted):
        at_bytes = int((number + 0.5) / wanted * ends_bytes[-1])
        index = int(np.searchsorted(ends_bytes, at_bytes, side="right"))
        size_bytes = sizes_bytes[index]
        start_bytes = min(at_bytes - int(ends_bytes[index]) + size_bytes, size_bytes - stretch_bytes)
        yield _read(files[index], max(0, start_bytes), stretch_bytes), 1


def _read(path: Path, start_bytes: int, size_bytes: int) -> str:
    """Read a stretch, from the first whole word on."""
    with path.open("rb") as file:
        file.seek(start_bytes)
        text = file.read(size_bytes).decode("utf-8", errors="ignore")
    return (text.partition(" ")[2] or text) if start_bytes else text
