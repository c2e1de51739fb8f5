"""The short form of scripts/bench/wire.py: int8 rows take half the bytes of float16 and move the model further."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

WIRE = Path(__file__).parents[1] / "scripts" / "bench" / "wire.py"


@pytest.mark.slow
def test_wires_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text(" = Kettle = \n\n A kettle boils water . It is loud .\n")
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "qwen2_moe", max_position_embeddings=512)
    line = [sys.executable, str(WIRE), "--data-dir", str(tmp_path / "data"), "--model", str(checkpoint)]
    line += ["--dataset", "piqa-sample", "--rows", "2", "--tokens", "40", "--engine", "numpy"]
    done = subprocess.run([*line, "--json", "-"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] == (done.returncode == 0)
    # Rows of 32 numbers and their scale: 36 bytes for 64; the bar is for rows of hundreds.
    assert result["int8_over_fp16_bytes"] == (4 + 32) / 64 and not result["reached"]["int8_over_fp16_bytes"]
    fp16, int8 = result["wires"]["fp16"], result["wires"]["int8"]
    assert fp16["tokens"] == int8["tokens"] == 40 and int8["reached"]["points"] is None
    assert 0 <= fp16["mean_kl_nats"] < int8["mean_kl_nats"]
