"""The short form of scripts/bench/carve_quality.py, on a tiny random model that is its own dense original."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

QUALITY = Path(__file__).parents[1] / "scripts" / "bench" / "carve_quality.py"


@pytest.mark.slow
def test_tampered_routers_are_scored_and_missed_bars_fail(tmp_path: Path) -> None:
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    (tmp_path / "data" / "corpus" / "text.txt").write_text("A kettle boils water . It is loud .\n" * 4)
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "qwen2_moe", norm_topk_prob=True)
    line = [sys.executable, str(QUALITY), "--data-dir", str(tmp_path / "data"), "--text", "corpus/text.txt"]
    line += ["--model", str(checkpoint), "--dense", str(checkpoint), "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["ppl_ratio"] == pytest.approx(1, abs=1e-6)
    assert result["active_share"] == pytest.approx((40 + 2 * 24) / 48)
    assert "active_share" in result["missed"]
    assert "ppl_ratio" not in result["missed"]
    assert result["largest_over_smallest_weight"] > 1
    assert result["uniform_weights_ppl_ratio"] != pytest.approx(1, abs=1e-9)
    assert result["fixed_experts_ppl_ratio"] != pytest.approx(result["uniform_weights_ppl_ratio"], abs=1e-9)
    assert result["drop_random_loss_increase_nats"] != 0


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    line = [sys.executable, str(QUALITY), "--data-dir", str(tmp_path), "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2
    assert "no file" in done.stderr
    assert "Traceback" not in done.stderr
