"""A run in virtual time: the answers of a real one, the same every time, and latencies that can be worked out by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

from wdmoe.bs.cli import main
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact, Wlr
from wdmoe.bs.questions import Answer, Choice, Question
from wdmoe.bs.records import Record
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import Station, open_station
from wdmoe.bs.virtual import VirtualDevice, open_virtual_station, static_shares
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.profiles.device_profile import Point
from wdmoe.profiles.modelled import ExpertShape, modelled_profile
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.messages import ExpertReply, ExpertRequest, Message, encode

MIXTRAL = ExpertShape(4096, 14336)
FAST, SLOW = "radio:mhz=100:efficiency=6", "radio:mhz=100:efficiency=2"
FOUR = VirtualConfig(
    ("agx-orin-64gb", "orin-nx-16gb", "orin-nx-8gb", "orin-nano-8gb"),
    (FAST, FAST, SLOW, SLOW),
    cost_shape=MIXTRAL,
    cost_precision="int4",
    engine="numpy",
)
QUESTIONS = [
    Question(
        f"q/{n}",
        tuple(Choice(tuple(f"Question {n}: bread\nAnswer:".encode()), tuple(c)) for c in (b" in a box", b" in bags")),
    )
    for n in range(4)
]


def quiet(text: str) -> None:
    """Say nothing."""


def score(
    bundle: Path, virtual: VirtualConfig = FOUR, policy: Any = None, in_flight: int = 1
) -> tuple[list[Answer], list[Record]]:
    with open_virtual_station(StationConfig(bundle, threads=1, in_flight=in_flight), virtual, quiet) as station:
        scorer = DistributedScorer(station.pipeline, policy or Exact(), in_flight, None)
        return scorer.score(QUESTIONS), scorer.records


def test_answers_are_those_of_a_real_run(bundle: Path, address: str) -> None:
    with open_station(StationConfig(bundle, address, threads=1, wait_s=20), quiet) as station:
        real = DistributedScorer(station.pipeline, Exact(), 1, None).score(QUESTIONS)
    assert score(bundle)[0] == real  # to the bit


@pytest.mark.parametrize("in_flight", [1, 3])
def test_the_same_run_takes_the_same_time_to_the_bit(bundle: Path, in_flight: int) -> None:
    jittery = replace(FOUR, links=("wifi-5ghz-far",))
    first, second = (score(bundle, jittery, Wlr(), in_flight) for _ in range(2))
    assert first == second
    _, other = score(bundle, replace(jittery, seed=1), Wlr(), in_flight)
    assert [record.latency_ms for record in other] != [record.latency_ms for record in first[1]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, all of whose experts are on one device."""
    folder = tmp_path_factory.mktemp("alone")
    config = ExportConfig(folder / "bundle", devices=1)
    return export_bundle(plan_export(tiny.tiny_checkpoint(folder / "c", "mixtral"), "mixtral", config), config).out


def one_token(station: Station) -> Record:
    microbatch = pack_sequence("one", [65], new_cache(station.manifest, 1), None)
    ((_, _, record),) = station.pipeline.run([microbatch], Exact())
    return record


def test_latency_is_what_is_worked_out_by_hand(alone: Path) -> None:
    virtual = VirtualConfig(
        ("orin-nano-8gb",), (f"{SLOW}:rtt_ms=3",), cost_shape=MIXTRAL, cost_precision="int4", stage_ms=1.5
    )
    with open_virtual_station(StationConfig(alone), virtual, quiet) as station:
        record = one_token(station)
    # One row of 4096 float16 each way, two experts; headers are charged as they are.
    down = len(encode(Message(ExpertRequest(1, 0, 1, "fp16", (0, 1), (1, 1), bytes(8), bytes(8))))[0]) + 8192
    up = len(encode(Message(ExpertReply(1, 1, "fp16", 0, 0)))[0]) + 8192
    call_ms = modelled_profile("orin-nano-8gb", "int4", MIXTRAL).call_ms(1)
    block_ms = 3 + (down + up) * 8 / 200e3 + 2 * call_ms
    assert record.latency_ms == pytest.approx(3 * 1.5 + 2 * block_ms, rel=1e-9)
    assert record.bs_ms == pytest.approx(4.5)
    assert [block.waiting_ms for block in record.blocks] == pytest.approx([block_ms] * 2, rel=1e-9)


def test_a_tap_makes_a_device_slower_than_it_says(alone: Path) -> None:
    virtual = VirtualConfig(("orin-nano-8gb",), (SLOW,), cost_shape=MIXTRAL, cost_precision="int4")

    def tired(device: VirtualDevice) -> VirtualDevice:
        points = tuple(Point(point.tokens, 3 * point.p50_ms, 3 * point.p95_ms) for point in device.air.profile.points)
        device.air.profile = msgspec.structs.replace(device.air.profile, points=points)
        return device

    def took(tap: Callable[[VirtualDevice], VirtualDevice]) -> tuple[float, float]:
        with open_virtual_station(StationConfig(alone), virtual, quiet, tap) as station:
            latency_ms = one_token(station).latency_ms
            return latency_ms, station.hub.devices["device-0"].latency.model().correction

    (said_ms, right), (tired_ms, corrected) = took(lambda device: device), took(tired)
    call_ms = modelled_profile("orin-nano-8gb", "int4", MIXTRAL).call_ms(1)
    assert tired_ms == pytest.approx(said_ms + 2 * 2 * 2 * call_ms)  # blocks, experts, two times longer
    assert right == pytest.approx(1, abs=0.01) and 1.5 < corrected < 3  # the link is as it was


def test_several_in_flight_end_sooner_together_and_later_each(bundle: Path) -> None:
    def times(in_flight: int) -> tuple[float, float]:
        config = StationConfig(bundle, threads=1, in_flight=in_flight)
        with open_virtual_station(config, FOUR, quiet) as station:
            started_s = station.hub.clock.now_s()
            scorer = DistributedScorer(station.pipeline, Exact(), in_flight, None)
            scorer.score(QUESTIONS)
            return station.hub.clock.now_s() - started_s, max(record.latency_ms for record in scorer.records)

    (alone_s, alone_ms), (together_s, together_ms) = times(1), times(3)
    assert together_s < alone_s and together_ms > alone_ms


def test_shares_of_a_band_are_worth_their_part_and_per_block_beats_uniform(bundle: Path) -> None:
    def total(bandwidth: str, in_flight: int = 1) -> float:
        virtual = replace(FOUR, channel="orthogonal", bandwidth=bandwidth)
        return sum(record.latency_ms for record in score(bundle, virtual, in_flight=in_flight)[1])

    assert total("uniform") == pytest.approx(total("0.25,0.25,0.25,0.25"))
    assert total("0.125,0.125,0.125,0.125") > 1.4 * total("uniform")
    assert total("per-block") < 0.95 * total("uniform")


@pytest.mark.parametrize("counted", [False, True])
def test_static_shares_follow_the_use_of_experts(bundle: Path, counted: bool, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    manifest = read_manifest(bundle / "bs", BsManifest)
    spec = manifest.model
    counts = None
    if counted:  # the experts of one device are hardly used
        owner = np.array([[holders[0] for holders in block] for block in manifest.placement])
        counts = np.where(owner == 3, 1, 100)
        (tmp_path / "counts.json").write_text(json.dumps(counts.tolist()))
    virtual = replace(FOUR, channel="orthogonal", bandwidth="static")
    shares = static_shares(virtual, manifest, counts)
    assert 0.999 < shares.sum() <= 1 and shares.min() > 0
    if counted:
        assert shares[3] < 0.05 < shares[2]
    else:
        assert shares[2:].min() > 1.4 * shares[:2].max()  # those on slow links
    config = StationConfig(bundle, threads=1, bs_counts=tmp_path / "counts.json" if counted else None)
    with open_virtual_station(config, virtual, quiet) as station:
        assert station.virtual is not None and station.virtual.shares == tuple(shares)
        link_ms = [station.hub.devices[f"device-{k}"].latency.model().row_link_ms for k in range(4)]
        assert link_ms == pytest.approx(
            [link.row_ms(8192) / b for link, b in zip(virtual.profiles, shares, strict=True)]
        )
        record = one_token(station)
    assert spec.n_blocks == len(record.blocks)


def test_what_cannot_be_is_refused(bundle: Path) -> None:
    unfit: tuple[tuple[dict[str, Any], str], ...] = (
        ({"devices": ("agx-orin-64gb",), "links": (FAST,)}, "4 device folders, --devices names 1"),
        ({"cost_shape": ExpertShape(16384, 53248), "cost_precision": "fp16"}, "cannot hold this slice"),
    )
    for changed, reason in unfit:
        with (
            pytest.raises((WdmoeError, ValueError), match=reason),
            open_virtual_station(StationConfig(bundle), replace(FOUR, **changed), quiet),
        ):
            pass
    wrong: tuple[dict[str, Any], ...] = (
        {"devices": ("toaster",)},
        {"links": ("string",)},
        {"links": (FAST, SLOW)},
        {"bandwidth": "uniform"},
        {"channel": "orthogonal", "bandwidth": "0.5,0.5,0.5,0.5"},
        {"channel": "orthogonal", "bandwidth": "0.5,0.5"},
        {"stage_ms": -1.0},
    )
    for changed in wrong:
        with pytest.raises(ValueError):
            replace(FOUR, **changed)


def command(bundle: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", "--bundle", str(bundle), "--dataset", "piqa-sample", *arguments])


@pytest.mark.timeout(180)
def test_the_command_says_that_times_are_modelled_and_repeats_itself(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    options = ["--limit", "2", "--clock", "virtual", "--devices", ",".join(FOUR.devices), "--link", "wifi-6-far"]
    shown = command(bundle, *options)
    assert shown.exit_code == 0, shown.output
    assert "over modelled links in virtual time (fp16)" in " ".join(shown.stdout.split())
    assert "Where the virtual time of a question goes" in shown.stdout
    results = []
    for name in ("a.json", "b.json"):
        done = command(bundle, *options, "--json", str(tmp_path / name))
        assert done.exit_code == 0, done.output
        result = json.loads((tmp_path / name).read_bytes())
        for entry in result["results"]:
            del entry["wall_s"]
        del result["date"], result["command"]
        results.append(result)
    assert results[0] == results[1]
    clock = results[0]["clock"]
    assert clock["kind"] == "virtual" and clock["origin"].startswith("modelled") and clock["channel"] == "shared"
    assert {device["origin"] for device in results[0]["devices"]} == {"emulated"}


def test_options_of_one_clock_are_refused_with_the_other(bundle: Path) -> None:
    done = command(bundle, "--devices", "agx-orin-64gb")
    assert done.exit_code == 2 and "--devices is for modelled devices; give --clock virtual" in done.stderr
    done = command(bundle, "--clock", "virtual", "--devices", "agx-orin-64gb")
    assert done.exit_code == 2 and "--clock virtual needs --link" in done.stderr


def test_the_command_divides_the_band_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    pytest.importorskip("scipy")
    options = ["--limit", "1", "--clock", "virtual", "--devices", ",".join(FOUR.devices), "--link", "wifi-6-far"]
    options += ["--channel", "orthogonal", "--bandwidth", "static"]
    done = command(bundle, *options)
    assert done.exit_code == 0 and "static shares of the band 0." in done.stderr, done.output
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    done = command(bundle, *options)
    assert done.exit_code == 1 and "needs SciPy" in done.stderr and "wdmoe[scheduler]" in done.stderr
