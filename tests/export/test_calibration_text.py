"""Windows of calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_dense

from wdmoe.export.calibration_text import calibration_files, calibration_windows
from wdmoe.export.checkpoint import Checkpoint, open_checkpoint
from wdmoe.runtime.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_dense.tiny_dense(tmp_path / "dense", "llama"))


def test_windows_are_whole_spread_over_all_files_and_the_same_every_time(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    files = [tiny_dense.text_file(tmp_path / f"{letter}.txt", f"{letter * 7} " * 2000) for letter in "abc"]
    windows = calibration_windows(checkpoint, files, 20 * 32, 32)
    again = calibration_windows(checkpoint, files, 20 * 32, 32)
    assert windows.token_ids.shape == (20, 32)
    assert (windows.token_ids == again.token_ids).all()
    counts = [int(((windows.token_ids == ord(letter)).sum(axis=1) > 16).sum()) for letter in "abc"]
    assert sum(counts) == 20 and min(counts) >= 6


def test_some_windows_are_held_out_the_last_at_least(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = tiny_dense.text_file(tmp_path / "text.txt")
    held_out = calibration_windows(checkpoint, [text], 32 * 32, 32).held_out
    assert (len(held_out), held_out.sum(), held_out[7], held_out[-1]) == (32, 4, True, True)
    assert list(calibration_windows(checkpoint, [text], 2 * 32, 32).held_out) == [False, True]


def test_of_a_short_text_every_token_is_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = tiny_dense.text_file(tmp_path / "text.txt", "x" * 500)
    assert calibration_windows(checkpoint, [text], 10_000, 32).token_ids.shape == (15, 32)


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    folder = tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [tiny.BOS], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tiny_dense.text_file(tmp_path / "text.txt")
    windows = calibration_windows(open_checkpoint(folder), [text], 320, 32)
    assert windows.token_ids.shape == (10, 32)
    assert (windows.token_ids[:, 0] == tiny.BOS).all()
    assert (windows.token_ids[:, 1:] != tiny.BOS).all()


def test_what_is_no_calibration_text_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dense: has no \*.txt"):
        calibration_files([tmp_path / "dense"])
    empty = tiny_dense.text_file(tmp_path / "empty.txt", "")
    with pytest.raises(CheckpointError, match="is empty"):
        calibration_files([empty])
    short = tiny_dense.text_file(tmp_path / "short.txt", "few words")
    with pytest.raises(CheckpointError, match="gives 0 windows of 32 tokens; at least 2"):
        calibration_windows(checkpoint, [short], 1000, 32)


def test_a_tokenizer_that_is_missing_damaged_or_of_another_model_is_named(tmp_path: Path) -> None:
    text = tiny_dense.text_file(tmp_path / "text.txt")
    small = open_checkpoint(tiny_dense.tiny_dense(tmp_path / "small", "llama", vocab_size=100))
    with pytest.raises(CheckpointError, match="has vocab_size 100"):
        calibration_windows(small, [text], 1000, 32)
    path = small.folder / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read"):
        calibration_windows(small, [text], 1000, 32)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json: missing.*save_pretrained"):
        calibration_windows(small, [text], 1000, 32)
