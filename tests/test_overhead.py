"""The short form of scripts/bench/overhead.py: layers and echoes through real, encrypted device processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

OVERHEAD = Path(__file__).parents[1] / "scripts" / "bench" / "overhead.py"


@pytest.mark.slow
def test_layers_and_echoes_alternate_through_the_same_processes() -> None:
    options = ["--devices", "2", "--rows", "3", "--rounds", "3", "--d-model", "256", "--json", "-"]
    done = subprocess.run(
        [sys.executable, str(OVERHEAD), *options], capture_output=True, text=True, timeout=120, check=False
    )
    result = json.loads(done.stdout)  # on a busy machine the bar may be missed, which is the exit code
    (point,) = result["points"]
    assert done.returncode == (0 if result["passed"] else 1)
    assert point["layers"] == 3 * 16 and 0 < point["echo_p50_ms"] < point["layer_p50_ms"]
    assert point["layer_over_echo"] == pytest.approx(point["layer_p50_ms"] / point["echo_p50_ms"])
    assert point["layer_over_echo_in_place"] == pytest.approx(point["layer_p50_ms"] / point["echo_in_place_p50_ms"])
    assert 2 * 3 * 256 * 2 < point["bytes_down"] < 2 * (3 * 256 * 2 + 1000)  # each row to both, as fp16, and headers
