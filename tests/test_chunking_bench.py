"""The short form of scripts/bench/chunking.py: the same answers in pieces, in virtual time and over device processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")
BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "chunking.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("real", [False, True])
def test_prompts_in_pieces_are_answered_alike(real: bool) -> None:
    line = [sys.executable, str(BENCH), "--model", "tiny", "--tokens", "256", "--link", "ethernet-1g", "--repeat", "1"]
    line += ["--real", "--json", "-"] if real else ["--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = result["prompts"]["ethernet-1g, 256 tokens"]
    assert found["requests"]["whole"] < found["requests"]["in_pieces"]
    assert found["largest_difference_of_a_logit"] < 1e-2  # rows travel in fp16
    assert ("virtual" in result["origin"]) != real
    if not real:  # how soon replies come for real depends on who else is on the machine
        assert found["gain"] > 0.1
