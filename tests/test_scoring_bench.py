"""The short form of scripts/bench/scoring.py: a tiny model, every arm once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

SCORING = Path(__file__).parents[1] / "scripts" / "bench" / "scoring.py"


@pytest.mark.slow
def test_all_arms_answer_the_same_rows_alike(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    rows = [
        {"goal": f"keep {what} fresh", "sol1": "a dry box", "sol2": "a dry bag of rice"} for what in ("tea", "bread")
    ]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "qwen2_moe")
    options = [
        "--data-dir",
        tmp_path,
        "--model",
        checkpoint,
        "--rows",
        2,
        "--threads",
        1,
        "--stage-workers",
        2,
        "--device-threads",
        1,
        "--batch",
        2,
        "--in-flight",
        1,
        "--in-flight",
        2,
    ]
    options += ["--transport", "ipc", "--torch-batch", 1, "--experts", "eager", "--json", "-"]
    line = [sys.executable, str(SCORING), *map(str, options)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert result["answers"]["disagreements"] == 0 and result["answers"]["max_abs_ll_difference"] < 1e-3
    assert result["answers"]["single_process"]["max_abs_ll_difference"] < 1e-4
    ours, other = result["distributed"]
    assert (ours["in_flight"], other["in_flight"], ours["stage_workers"]) == (1, 2, 2)
    ours = min(ours, other, key=lambda run: float(run["wall_s"]))
    (single,), (theirs,) = result["single_process"], result["transformers"]
    assert ours["tokens"] == single["tokens"] == result["trie"]["tokens"] < result["trie"]["tokens_without"]
    assert result["distributed_over_single_process"] == pytest.approx(ours["wall_s"] / single["wall_s"])
    assert result["speedup_over_transformers"] == pytest.approx(theirs["wall_s"] / ours["wall_s"])
