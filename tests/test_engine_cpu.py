"""The short form of scripts/bench/engine_cpu.py, and what its measurements are repeated for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_checkpoint

from scripts.bench.engine_cpu import time_over_floor
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime.manifest import Precision

BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "engine_cpu.py"


def test_calls_are_held_against_the_reading_of_their_turn() -> None:
    # 10 MB an expert: at 1, 2 and 4 GB/s in 10, 5 and 2.5 ms; calls of 15, 10 and 5 ms on average.
    calls_ms = [14.0, 16.0, 9.0, 11.0, 4.0, 6.0]
    assert time_over_floor(calls_ms, [1.0, 2.0, 4.0], 10e6) == pytest.approx(2.0)
    assert time_over_floor(calls_ms[:2], [1.0], 10e6) == pytest.approx(1.5)


@pytest.mark.slow
def test_small_experts_are_measured_and_a_missed_bar_is_an_exit_code() -> None:
    line = [sys.executable, str(BENCH), "--shape", "1024x3584", "--threads", "1", "--calls", "10", "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    # Experts of 5.7 MB: what ONNX Runtime itself takes weighs more, and the machine may be busy.
    over = [name for name, bar in result["bars"].items() if result[name] > bar]
    assert result["missed"] == over and done.returncode == (1 if over else 0)
    int4, fp16 = result["precisions"]["int4"], result["precisions"]["fp16"]
    assert int4["packed_bytes"] == pytest.approx(2 * 3 * 1024 * 3584 * (0.5 + 2 / 128), rel=0.01)
    assert fp16["packed_bytes"] == pytest.approx(2 * 3 * 1024 * 3584 * 2, rel=0.01)
    assert fp16["rss_bytes"] > 2 * 3 * 1024 * 3584 * 4  # held as float32
    assert 0 < int4["rss_bytes"] < fp16["rss_bytes"] / 2
    assert result["int4_time_over_floor"] == int4["time_over_floor"]
    assert int4["call_p05_ms"] / 3 < int4["time_over_floor"] * int4["floor_ms"] < 3 * int4["call_p95_ms"]
    assert int4["floor_ms"] == pytest.approx(int4["packed_bytes"] / 2 / int4["read_gb_per_s"] / 1e6)
    assert 1 <= int4["attempts"] <= 4 and int4["disturbed"] == (int4["others_cpu_share"] > 0.05)


def test_two_folders_are_compared_in_turns(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "mixtral")
    folders: list[str] = []
    precisions: tuple[Precision, ...] = ("fp32", "int4")
    for precision in precisions:
        config = ExportConfig(tmp_path / precision, precision=precision)
        export_bundle(plan_export(checkpoint, "tiny", config), config)
        folders.append(str(config.out / "device-0"))
    line = [sys.executable, str(BENCH.with_name("two_folders.py")), "--rows", "3", "--turns", "2", "--json", "-"]
    done = subprocess.run([*line, *folders], capture_output=True, text=True, timeout=100, check=True)
    result = json.loads(done.stdout)
    assert result["precisions"] == ["fp32", "int4"] and result["shape"] == "32x24"
    found = result["rows"]["3"]
    assert found["ratio"] > 0 < found["before_ms"] and 0.01 < found["difference"] < 0.5  # what int4 loses
    other = tiny_checkpoint(tmp_path / "other", "mixtral", hidden_size=64)
    config = ExportConfig(tmp_path / "wide")
    export_bundle(plan_export(other, "tiny", config), config)
    done = subprocess.run(
        [*line, folders[0], str(config.out / "device-0")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1 and "has experts of 32x24" in done.stderr and "nothing to compare" in done.stderr
