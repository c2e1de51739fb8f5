"""The short form of scripts/bench/tune_policies.py: options come out that reach the bar, and nothing is read twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "tune_policies.py"


@pytest.mark.timeout(400)
def test_options_are_found_within_the_margin_and_a_second_start_reads_nothing_again(tmp_path: Path) -> None:
    corpus = tmp_path / "data" / "corpus"
    corpus.mkdir(parents=True)
    for name in ("qa_train.txt", "classic_books.txt"):
        (corpus / name).write_text(f"What is in {name}? Bread, and how to keep it fresh. " * 20)
    line = [sys.executable, str(BENCH), "--data-dir", str(tmp_path / "data"), "--model", "tiny", "--tokens", "128"]
    line += ["--calibration-tokens", "128", "--probes", "1"]
    line += ["--sensitivity", str(tmp_path / "s.json"), "--json", str(tmp_path / "t.json")]

    def run() -> tuple[dict[str, object], str, str]:
        done = subprocess.run(line, capture_output=True, text=True, timeout=390, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "t.json").read_bytes()), done.stdout, done.stderr

    first, printed, told = run()
    assert "calibrated" in told and (tmp_path / "s.json").exists()
    assert printed.startswith("policies = [") and '"bottleneck:' in printed and '"wlr:' in printed
    rows = first["policies"]
    assert isinstance(rows, list)
    for row in rows:
        if row["within_margin"]:
            assert row["worst_divergence"] <= 0.015 and row["worst_perplexity_ratio"] <= 1.015
    assert any(row["within_margin"] and row["least_gain"] > 0 for row in rows)
    second, again, told = run()
    assert "calibrated" not in told and again == printed and second["readings"] == first["readings"]
