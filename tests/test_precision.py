"""The short form of scripts/bench/precision.py: what int8 and int4 cost a tiny model, and that a finished part is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

PRECISION = Path(__file__).parents[1] / "scripts" / "bench" / "precision.py"


@pytest.mark.slow
def test_a_precision_that_holds_the_same_numbers_is_seen_and_answers_the_same(tmp_path: Path) -> None:
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text(" = Kettle = \n\n A kettle boils water . It is loud .\n")
    for dtype, same in (("float16", True), ("float32", False)):
        checkpoint = tiny_checkpoint(tmp_path / dtype, "qwen2_moe", max_position_embeddings=512, dtype=dtype)
        line = [
            sys.executable,
            str(PRECISION),
            "--data-dir",
            str(tmp_path / "data"),
            "--model",
            str(checkpoint),
            "--json",
            "-",
        ]
        line += ["--dataset", "piqa-sample", "--rows", "2", "--tokens", "40", "--precision", "fp16", "--jobs", "1"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode in (0, 1), done.stderr
        fp16 = json.loads(done.stdout)["precisions"]["fp16"]
        assert fp16["same_numbers"] == same
        # NOTE: the text is read with the precision's own engine in either case.
        assert (fp16["perplexity_ratio"] == 1) == (fp16["mean_kl_nats"] == 0) == same
        assert (fp16["tokens"], fp16["rows"]) == (40, 2)


@pytest.mark.slow
def test_precisions_are_compared_and_what_was_done_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "data" / "wikitext2").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2" / "test.txt").write_text(" = Kettle = \n\n A kettle boils water . It is loud .\n")
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "qwen2_moe", max_position_embeddings=512)
    target = tmp_path / "precision.json"

    line = [sys.executable, str(PRECISION), "--data-dir", str(tmp_path / "data"), "--model", str(checkpoint)]
    line += ["--dataset", "piqa-sample", "--rows", "2", "--tokens", "40", "--precision", "int8", "--precision", "int4"]
    done = subprocess.run([*line, "--json", "-"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] == (done.returncode == 0)
    int8, int4 = result["precisions"]["int8"], result["precisions"]["int4"]
    assert int8["tokens"] == int4["tokens"] == 40
    assert (int8["rows"], int8["reached"]["points"]) == (2, None)  # too few to be judged
    assert 0 < int8["mean_kl_nats"] < int4["mean_kl_nats"]
    assert int8["perplexity_ratio"] == pytest.approx(1, abs=0.02)

    kept = target.with_name("precision.json.unfinished")
    first = subprocess.Popen([*line, "--json", str(target)], stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 200
    while not kept.exists() and first.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    first.kill()
    first.wait()
    again = subprocess.run([*line, "--json", str(target)], capture_output=True, text=True, timeout=200, check=False)
    assert "nothing of it is used again" not in again.stderr
    resumed = json.loads(target.read_text())["precisions"]
    assert resumed == result["precisions"]
    assert not list(tmp_path.glob("*.unfinished"))
