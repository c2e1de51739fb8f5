"""The short form of the simulator's benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "simulator.py"


def test_every_policy_and_medium_is_timed_and_the_worst_counts() -> None:
    line = [sys.executable, str(BENCH), "--devices", "50", "--blocks", "2", "--tokens", "20", "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["seconds"]) == {f"{p}, {m}" for p in ("exact", "wlr") for m in ("shared", "uniform", "per-block")}
    assert result["simulate_s"] == max(result["seconds"].values()) == result["seconds"][result["worst"]]
