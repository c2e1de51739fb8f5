"""The short form of scripts/bench/carve_command.py: a tiny model, carved and scored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_dense

BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "carve_command.py"


@pytest.mark.slow
def test_the_bench_carves_and_scores_each_case(tmp_path: Path) -> None:
    dense = tiny_dense.tiny_dense(tmp_path / "dense", "llama", intermediate_size=64)
    (tmp_path / "corpus").mkdir()
    tiny_dense.text_file(tmp_path / "corpus" / "a.txt")
    line = [sys.executable, str(BENCH), "--data-dir", str(tmp_path), "--model", str(dense), "--experts", "4"]
    line += [
        "--tokens",
        "1024",
        "--window",
        "32",
        "--windows",
        "4",
        "--case",
        "4:none",
        "--case",
        "2:layer",
        "--json",
        "-",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    whole, part = json.loads(done.stdout)["cases"]
    assert whole["perplexity_ratio"] == pytest.approx(1, rel=1e-5)  # all experts: the dense model
    assert part["active_share"] == 0.75 and part["error"] <= part["error_cut"] and part["error_cut"] > 0.01
    assert 10 < part["peak_rss_mb"] < 1000
