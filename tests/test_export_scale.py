"""The short form of scripts/bench/export_scale.py: a narrow checkpoint, every part once, int4 with figures of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCALE = Path(__file__).parents[1] / "scripts" / "bench" / "export_scale.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_part_gives_its_figures(tmp_path: Path) -> None:
    line = [sys.executable, str(SCALE), "--blocks", "1", "--repeats", "1", "--hidden", "256", "--ffn", "512"]
    done = subprocess.run(
        [*line, "--scratch", str(tmp_path), "--json", "-"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] == (done.returncode == 0)
    # Of so small a checkpoint the start of Python is most of the time, so the rate misses its bar: memory must not.
    assert all(one.startswith("throughput_vs_copy") for one in bars_missed(done.stderr))
    int4, int8 = result["quantised"]["int4"], result["quantised"]["int8"]
    assert int4["bytes_written"] < int8["bytes_written"] < result["bytes_written"]
    assert int4["seconds_vs_fp16"] == pytest.approx(int4["export_s"][0] / result["export_s"][0])
    assert 0 < int4["peak_anonymous_mb"] <= int4["peak_rss_mb"] <= result["bars"]["peak_rss_mb"]
    assert result["memory_growth"] == pytest.approx(1, abs=0.2)
    assert not list(tmp_path.iterdir())


def bars_missed(stderr: str) -> list[str]:
    found = [line.partition("missed: ")[2] for line in stderr.splitlines() if "missed: " in line]
    return found[0].split(", ") if found else []
