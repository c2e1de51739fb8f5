"""Emulated devices as processes: they keep their profile, and every report says that they are emulated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import command, device_processes, free_address

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.bench.emulation import Sample, measure_all

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "scripts" / "bench" / "emulation.py"
EMULATE = ["--emulate", "orin-nx-16gb", "--link", "wifi-6", "--seed", 3, "--cost-shape", "1024x2048"]
SAID = "emulated orin-nx-16gb over wifi-6-mid, charged as 1024x2048 fp16"


def test_an_emulated_device_answers_when_its_profile_says_even_on_a_busy_machine() -> None:
    # Long enough for a machine that is late by tens of milliseconds now and then; the bar of the bench itself is 5 %.
    options = ["--link", "wifi-5ghz-far", "--tokens", "64", "--tokens", "128", "--seconds", "2", "--bar", "0.25"]
    options += ["--minutes", "0.2"]
    line = [sys.executable, str(BENCH), *options, "--json", "-"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["max_relative_error"] <= 0.25 and result["origin"] == "emulated"
    assert [point["tokens"] for point in result["points"]] == [64, 128]
    assert result["cells"] == 2 and 0 <= result["disturbed_cells"] <= 2 and abs(result["bias"]["wifi-5ghz-far"]) <= 0.25
    assert 0.75 < result["correction"]["wifi-5ghz-far"] < 1.25
    for point in result["points"]:
        assert point["measured_p05_ms"] > 0.97 * point["predicted_p50_ms"]  # the jitter: 2 of 119 ms


def test_the_most_disturbed_cells_are_measured_again_while_there_is_time() -> None:
    shares = {1: [0.3, 0.02], 2: [0.01], 4: [0.5, 0.6, 0.04]}

    def cell(tokens: int) -> Sample:
        share = shares[tokens].pop(0)
        return Sample(tokens, [share], 0, 0, share)

    samples = measure_all([1, 2, 4], cell, time.monotonic() + 60, "x")
    assert {tokens: sample.others_cpu_share for tokens, sample in samples.items()} == {1: 0.02, 2: 0.01, 4: 0.04}
    assert not any(shares.values())
    shares[1] = [0.9]
    assert measure_all([1], cell, time.monotonic() - 1, "x")[1].others_cpu_share == 0.9  # once, whatever the time


def test_every_report_says_what_is_emulated(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    address, path = free_address(), tmp_path / "run.json"
    fixed = ["--bundle", bundle, "--listen", address, "--wait", 30]
    with device_processes(bundle, address, EMULATE):
        ran = [*fixed, "--dataset", "piqa-sample", "--policy", "exact", "--limit", 2, "--json", path]
        done = subprocess.run(command("wdmoe-bs", "run", *ran), capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        listed = command("wdmoe-bs", "devices", *fixed)
        table = subprocess.run(listed, capture_output=True, text=True, timeout=60, check=False)
        as_json = subprocess.run([*listed, "--json"], capture_output=True, text=True, timeout=60, check=False)
    report = json.loads(path.read_text())
    for device in (*report["devices"], *json.loads(as_json.stdout)["devices"]):
        assert device["origin"] == "emulated" and "(emulated on " in device["hardware"]
        assert device["emulated"] == {
            "device": "orin-nx-16gb", "link": "wifi-6-mid", "seed": 3, "d_model": 1024, "d_ff": 2048, "precision": "fp16",
            "shared": False,
            "share": 1.0,
        }  # fmt: skip
        assert device["round_trip_ms"] > 1.8
    assert report["link"]["emulated"] == ["wifi-6-mid"]
    assert f"device-0 ({SAID})" in done.stderr
    assert f"4 devices over loopback (fp16), 4 {SAID}" in " ".join(done.stdout.split())
    assert table.returncode == 0 and f"device-3: {SAID}" in table.stdout and "emulated orin" in table.stdout
    assert "then emulated ms of one expert call" in " ".join(table.stdout.split())
    # Two blocks, and no question is answered in less than the two round trips of its microbatches.
    assert report["results"][0]["latency_p50_ms"] > 2 * 2.0
