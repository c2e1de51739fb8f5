"""The short form of scripts/bench/engine_cuda.py, on the CPU in place of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ort = pytest.importorskip("onnxruntime")
BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "engine_cuda.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(BENCH), "--shape", "256x512", "--tokens", "1", "--tokens", "8", *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_errors_and_times_of_all_precisions_are_reported() -> None:
    done = run("--on", "cpu", "--json", "-")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["on"] == "cpu" and "CPUExecutionProvider" in result["engine"] and result["memory_gb_per_s"] > 0
    assert list(result["precisions"]) == ["fp16", "int8", "int4"]
    for found in result["precisions"].values():
        assert 0 < found["max_error"] <= found["tolerance"]
        assert [point["tokens"] for point in found["points"]] == [1, 8]
        assert all(0 < point["p50_ms"] <= point["p95_ms"] for point in found["points"])


@pytest.mark.slow
@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    done = run()
    assert done.returncode == 2 and "built without CUDA" in done.stderr and "Traceback" not in done.stderr
