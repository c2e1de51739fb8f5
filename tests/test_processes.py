"""The commands as a user starts them, each a process of its own, over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import command, device_processes, free_address, stop

pytestmark = pytest.mark.slow

DEVICES = ["device-0", "device-1", "device-2", "device-3"]


def bs_run(bundle: Path, address: str, *options: object) -> list[str]:
    fixed = ["--bundle", bundle, "--listen", address, "--dataset", "piqa-sample", "--wait", 30]
    return command("wdmoe-bs", "run", *fixed, *options)


@contextmanager
def started(line: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, as a terminal would; leave nothing of it behind."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    try:
        yield process
    finally:
        stop([process])


def wait_until_said(log: Path, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 30
    while log.read_text().count(text) < times:
        assert time.monotonic() < deadline, f"waited for {text!r}, got: {log.read_text()}"
        time.sleep(0.01)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_run_through_four_device_processes_answers_and_a_lost_device_ends_it_by_name(
    bundle: Path, tmp_path: Path
) -> None:
    address = free_address()
    log = tmp_path / "bs.log"
    with device_processes(bundle, address) as devices:
        line = bs_run(bundle, address, "--limit", 5, "--json", "-")
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert [device["name"] for device in result["devices"]] == DEVICES
        assert [run["policy"] for run in result["results"]] == ["exact", "wlr"]
        for run in result["results"]:
            assert run["rows"] == 5 and 0 <= run["accuracy"]["acc"] <= 1
            assert len(run["log_likelihoods"]) == 5 and all(
                value < 0 for row in run["log_likelihoods"] for value in row
            )
            assert (
                run["latency_p50_ms"] > 0
                and run["bytes_down"] > 0
                and run["dropped_share"] == (0 if run["policy"] == "exact" else pytest.approx(run["dropped_share"]))
            )

        # The devices wait for the next base station, which loses one of them.
        with started(bs_run(bundle, address, "--policy", "exact"), log) as bs:
            wait_until_said(log, "connected: ")
            devices[2].send_signal(signal.SIGKILL)
            killed_at = time.monotonic()
            assert bs.wait(30) == 1
            took_s = time.monotonic() - killed_at
        text = log.read_text()
        assert "Error: device-2: " in text and "Traceback" not in text
        assert took_s < 8  # late after 2 s, silent after 2 s; the rest is the end of a Python process
        for index in (0, 1, 3):
            devices[index].send_signal(signal.SIGINT)
        assert [devices[index].wait(10) for index in (0, 1, 3)] == [0, 0, 0]


def test_one_command_serves_a_whole_bundle_and_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    address = free_address()
    log = tmp_path / "devices.log"
    with started(command("wdmoe-device", "--bundle", bundle, "--bs", address), log) as devices:
        line = bs_run(bundle, address, "--limit", 2, "--policy", "exact", "--json", tmp_path / "result.json")
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "piqa-sample: 2 rows" in done.stdout
        result = json.loads((tmp_path / "result.json").read_text())
        assert [device["name"] for device in result["devices"]] == DEVICES
        wait_until_said(log, "base station gone", times=4)
        os.killpg(devices.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal's foreground
        assert devices.wait(15) == 0
        assert group_is_gone(devices.pid)
    text = log.read_text()
    assert text.count("stopped after") == 4 and "Traceback" not in text
