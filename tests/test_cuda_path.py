"""The short form of scripts/bench/cuda_path.py; on a GPU also the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "cuda_path.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(BENCH), "--json", "-", *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_after_the_parity_of_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed; WDMOE_EXTRAS=cuda-test scripts/test has it")
    done = run("--rows", "1", "--rows", "64", "--experts", "8", "--top-k", "2")
    assert done.returncode == 2, done.stderr
    assert "not run on a GPU" in done.stderr and "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert result["parity"] is True and result["gpu"] is None
    assert result["points"] == [] and result["handoff_us_at_one_row"] is None and result["within_bar"] is None


def test_more_chosen_experts_than_there_are_is_a_usage_error() -> None:
    done = run("--experts", "2", "--top-k", "4")
    assert done.returncode == 2 and "4 of 2 experts" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_agree_with_numpy_on_a_gpu_and_are_timed() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["parity"] is True and [point["rows"] for point in result["points"]] == [1, 64, 1024]
    assert all(point["total_us"] > 0 and point["torch_total_us"] > 0 for point in result["points"])
