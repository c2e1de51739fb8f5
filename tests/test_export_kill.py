"""The short form of scripts/bench/export_kill.py: an exporter that is killed, and one that is killed twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parents[1] / "scripts" / "bench" / "export_kill.py"


@pytest.mark.slow
def test_a_killed_exporter_goes_on_and_ends_with_the_same_bundle() -> None:
    line = [sys.executable, str(KILL), "--rounds", "2", "--width", "256", "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["killed"] >= 2 and result["different_bundles"] == 0 and result["rewritten_files"] == 0
