"""The short form of scripts/bench/scheduler.py: every policy is timed, and the worst one is what counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from wdmoe.bs.policies import POLICIES

SCHEDULER = Path(__file__).parents[1] / "scripts" / "bench" / "scheduler.py"


def test_every_policy_is_timed_and_the_slowest_counts() -> None:
    line = [sys.executable, str(SCHEDULER), "--json", "-", "--repeats", "1", "--no-simulation"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] == (done.returncode == 0) == all(result["reached"].values())
    for figure, times in (("decide_us_1", "us_1"), ("decide_ms_4096x8x8", "ms_4096x8x8")):
        assert result[figure] == max(result[times].values()) > 0
        assert result["reached"][figure] == (result[figure] <= result["bars"][figure])
        assert {name.split(" ")[0].partition(":")[0] for name in result[times]} == set(POLICIES)
        assert {name.split(" ")[1] for name in result[times]} == {"uniform", "per-block", "shared"}
