"""The short form of scripts/bench/soak.py: four device processes at work without a pause."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "scripts" / "bench" / "soak.py"


@pytest.mark.slow
def test_memory_stays_level_and_nothing_is_lost() -> None:
    line = [sys.executable, str(SOAK), "--minutes", "0.33", "--model", "tiny", "--sample", "0.5", "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["lost_requests"] == 0 and result["wrong_answers"] == 0 and result["level"]
    assert sorted(result["memory"]) == ["bs", *(f"device-{k}" for k in range(4))]
    assert result["answers"] > 100
