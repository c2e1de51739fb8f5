"""scripts/testbed: the plan as plain values, what it refuses, and where namespaces are permitted, the thing itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from scripts.bench._namespaces import (
    PREFIX,
    STATION,
    LimitedLink,
    NotPermitted,
    build_commands,
    check_permitted,
    ours,
    remove,
)
from scripts.bench.namespaces import band_options, limited_links, station_line
from scripts.bench.testbed import CONFIG, read_testbed
from wdmoe.profiles.link_profile import modelled_link

SCRIPT = ROOT / "scripts" / "bench" / "namespaces.py"
LINK_OPTIONS = ["--model", "tiny", "--only-links", "--seconds", "1"]


def why_not() -> str:
    """Say why this machine cannot have a testbed; nothing if it can, and none is there."""
    try:
        check_permitted()
        return "a testbed is there already" if ours() else ""
    except NotPermitted as error:
        return str(error)


permitted = pytest.mark.skipif(bool(reason := why_not()), reason=f"no namespaces here: {reason}")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)


def test_each_direction_is_limited_at_its_sender_by_frames_of_payload() -> None:
    lines = [" ".join(line) for line in build_commands([LimitedLink(0, 20.0, 5.0), LimitedLink(1, 1.0, 2.0)])]
    classes = [line.split() for line in lines if "class add" in line]
    limits = [(line[2], line[6], int(line[line.index("rate") + 1].removesuffix("bit"))) for line in classes]
    assert [(where, name) for where, name, _ in limits] == [
        (STATION, "link0"),
        (f"{PREFIX}device-0", "uplink"),
        (STATION, "link1"),
        (f"{PREFIX}device-1", "uplink"),
    ]
    payload = [rate * 1448 / 1514e6 for _, _, rate in limits]
    assert payload == pytest.approx([20.0, 5.0, 1.0, 2.0], rel=1e-6)
    assert sum("gso_max_segs 1" in line for line in lines) == 4  # else a whole message passes as one packet


def test_nothing_is_done_outside_namespaces_of_our_own_name() -> None:
    for line in build_commands([LimitedLink(k, 1.0, 1.0) for k in range(3)]):
        if line[:3] == ["ip", "netns", "add"]:
            assert line[3].startswith(PREFIX)
        else:
            assert line[0] in ("ip", "tc") and line[1] == "-n" and line[2].startswith(PREFIX)


def test_the_plan_scales_rates_to_the_rows_of_the_model_and_needs_no_root() -> None:
    done = run("--plan", "--model", "smollm2-moe")
    assert done.returncode == 0, done.stderr
    rates = [
        float(line.split(" rate ")[1].split("bit")[0]) * 1448 / 1514e6
        for line in done.stdout.splitlines()
        if "rate" in line
    ]
    expected = [100 * efficiency / 3 * 576 / 4096 for efficiency in (6, 6, 4, 4, 2, 2)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_a_band_that_is_divided_live_has_links_that_carry_all_of_it() -> None:
    testbed = read_testbed(CONFIG)
    links = limited_links(testbed, "6:4:2", 32, whole=True)
    assert [link.down_mbps for link in links] == pytest.approx([100 * e * 32 / 4096 for e in (6, 4, 2)])
    line = station_line(
        testbed, Path("b"), ("piqa", None), 1, ["exact"], Path("o"), band_options(testbed, "6:4:2", "static", links)
    )
    assert line[line.index("--bandwidth") + 1] == "0.198,0.294,0.508"
    stated = [modelled_link(link) for link in line[line.index("--link") + 1].split(",")]
    assert [(link.down_mbps, link.up_mbps) for link in stated] == [(link.down_mbps, link.up_mbps) for link in links]
    assert band_options(testbed, "6:4:2", "per-block", links)[2:] == ["--bandwidth", "per-block"]
    assert "--bandwidth" not in band_options(testbed, "6:4:2", None, links)


def test_help_shows_an_example_and_a_wrong_option_is_named() -> None:
    assert "sudo scripts/testbed --json result.json" in run("--help").stdout
    wrong = run("--plan", "--efficiency", "9:9:9")
    assert wrong.returncode == 2 and "expected one of 6:4:2, 5:5:5" in wrong.stderr


def test_who_is_not_root_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPermitted, match="need root; run it with sudo"):
        check_permitted()


def test_without_iproute2_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(NotPermitted, match="apt-get install iproute2"):
        check_permitted()


@pytest.mark.timeout(250)
@permitted
def test_measured_rates_are_those_asked_for_and_nothing_is_left() -> None:
    done = run(*LINK_OPTIONS, "--json", "-")
    result = json.loads(done.stdout)
    assert done.returncode in (0, 1), done.stderr
    for link in result["links"]:
        for way in ("down", "up"):
            # The bar of the script is 5 %; on a busy machine a transfer is late, but never early.
            assert -0.5 < link[way]["relative_error"] < 0.05
    assert [link["down"]["nominal_mbps"] for link in result["links"]] == pytest.approx(
        [1.5625, 1.0417, 0.5208], rel=1e-3
    )
    assert ours() == []


@pytest.mark.timeout(250)
@permitted
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_an_interruption(number: signal.Signals) -> None:
    line = [sys.executable, str(SCRIPT), "--model", "tiny", "--only-links", "--seconds", "30"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 120
        while len(ours()) < 4 and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.2)
        time.sleep(1.0)  # into the transfer
        assert process.poll() is None and len(ours()) == 4
        process.send_signal(number)
        process.wait(60)
        if number is signal.SIGKILL:  # it could do nothing: the next one does, or this
            assert len(ours()) == 4
            assert "removed wdmoe-testbed-" in run("--clean").stderr
        assert ours() == []
        assert "nothing is left" in run("--clean").stderr
    finally:
        process.kill()
        process.wait()
        remove(ours())
