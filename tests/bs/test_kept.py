"""Experts that the base station runs itself: which ones, from where, with the same answers, and what that is worth."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from inprocess import open_system, run_sequence

from wdmoe.bs.cli import main
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.kept import choose, keep_measured, most_used, sources, usage
from wdmoe.bs.latency import LatencyTracker
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Bottleneck, Exact, Policy, Wlr
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Record, summarise
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import Station, open_station
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.profiles.base_station import modelled_station
from wdmoe.profiles.device_profile import Point
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.errors import BundleError, DataError, DeviceError, WdmoeError
from wdmoe.runtime.manifest import BsManifest, Calibration, read_manifest

PROMPT = list(b"How does one keep bread fresh?")
MIXTRAL = ExpertShape(4096, 14336)
SLOW_LINK = "radio:mhz=100:efficiency=2:rtt_ms=3"
QUESTIONS = [
    Question(
        f"q/{n}",
        tuple(Choice(tuple(f"Question {n}: bread\nAnswer:".encode()), tuple(c)) for c in (b" in a box", b" in bags")),
    )
    for n in range(3)
]


def quiet(text: str) -> None:
    """Say nothing."""


def manifest_of(bundle: Path, counts: tuple[tuple[int, ...], ...] = ()) -> BsManifest:
    manifest = read_manifest(bundle / "bs", BsManifest)
    calibration = Calibration("text", manifest.calibration.norms, 100, counts)
    return msgspec.structs.replace(manifest, calibration=calibration) if counts else manifest


def let_devices_look_slow(pipeline: Pipeline) -> None:
    """Let the base station think that it is quicker than any device, so that it takes over all it can."""
    for device in pipeline._hub.devices.values():
        points = (Point(1, 1e4, 1e4),)
        device.latency = LatencyTracker(msgspec.structs.replace(device.latency.profile, points=points))


# -- which ones, and from where -------------------------------------------------------------------------------------


def test_the_most_used_come_first_and_without_counts_all_blocks_alike(bundle: Path) -> None:
    model = manifest_of(bundle).model
    counts = np.zeros((model.n_blocks, model.n_experts), np.int64)
    counts[1, 5], counts[0, 3], counts[1, 2] = 9, 7, 7
    assert most_used(counts, model)[:4] == [(1, 5), (1, 2), (0, 3), (0, 0)]
    assert most_used(None, model)[:4] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_counts_come_from_the_manifest_a_trace_or_a_file(bundle: Path, tmp_path: Path) -> None:
    nothing, why = usage(manifest_of(bundle), None)
    assert nothing is None and "wdmoe-export calibrate" in why
    rows = tuple(tuple(range(8 * b, 8 * b + 8)) for b in range(2))
    measured, why = usage(manifest_of(bundle, rows), None)
    assert measured is not None and measured.tolist() == [list(row) for row in rows] and "100 tokens" in why
    for content in (list(rows), {"counts": list(rows)}):
        (tmp_path / "counts.json").write_text(json.dumps(content))
        given, _ = usage(manifest_of(bundle), tmp_path / "counts.json")
        np.testing.assert_array_equal(given, measured)
    for text, reason in (("[[1, 2]]", "counts .* experts"), ("{}", "neither a trace"), ("no", "neither a trace")):
        (tmp_path / "counts.json").write_text(text)
        with pytest.raises(DataError, match=reason):
            usage(manifest_of(bundle), tmp_path / "counts.json")


def test_auto_takes_half_of_what_is_free_and_a_number_what_fits(bundle: Path) -> None:
    manifest = manifest_of(bundle)
    assert len(choose("auto", manifest, None, 100, 1000).experts) == 5
    assert len(choose("auto", manifest, None, 1, 1000).experts) == 16
    assert choose("auto", manifest, None, 1000, 1999).experts == ()
    assert choose("3", manifest, None, 100, 300).size_bytes == 300
    with pytest.raises(WdmoeError, match=r"--bs-experts 4 takes .* at most 3 fit"):
        choose("4", manifest, None, 100, 399)
    with pytest.raises(ValueError, match="has 16 experts in all"):
        choose("17", manifest, None, 1, None)
    with pytest.raises(WdmoeError, match="does not say how much memory is free"):
        choose("auto", manifest, None, 100, None)


def test_device_folders_give_the_graphs_and_else_the_folder_experts_is_enough(bundle: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    manifest = manifest_of(bundle)
    with_graphs = keep_measured("16", bundle / "bs", manifest, 1, None)
    for name in ("bs", "experts"):
        shutil.copytree(bundle / name, tmp_path / name)
    without = keep_measured("16", tmp_path / "bs", manifest, 1, None)
    assert with_graphs is not None and without is not None
    assert (with_graphs.profile.engine, without.profile.engine) == ("onnxruntime", "numpy")
    for block, expert in with_graphs.choice.experts:
        one, other = with_graphs.run(block, expert, rows), without.run(block, expert, rows)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    shutil.copytree(bundle / "device-0", tmp_path / "device-0")  # one of four does not hold all
    assert sources(tmp_path / "bs", manifest).slices == {}
    shutil.rmtree(tmp_path / "experts")
    with pytest.raises(BundleError, match="needs the folder `experts` of the bundle, or all its device"):
        keep_measured("1", tmp_path / "bs", manifest, 1, None)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_damaged_expert_is_refused_at_the_start(bundle: Path, tmp_path: Path, graphs: bool) -> None:
    shutil.copytree(bundle, tmp_path / "b")
    if not graphs:
        for k in range(4):
            shutil.rmtree(tmp_path / f"b/device-{k}")
    for path in (tmp_path / "b").glob("*/*.safetensors" if not graphs else "device-*/*.onnx"):
        if path.parent.name != "bs":
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
    with pytest.raises(BundleError, match="sha256 is"):
        keep_measured("auto", tmp_path / "b/bs", manifest_of(bundle), 1, None)


# -- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Exact(), Bottleneck(budget=(0.0,))], ids=lambda p: p.describe())
@pytest.mark.parametrize("keeps", ["1", "5", "16"])
def test_answers_are_those_without_it_and_its_rows_are_counted(bundle: Path, keeps: str, policy: Policy) -> None:
    with open_system(bundle, engine="onnxruntime") as system:
        expected = run_sequence(system, PROMPT, policy)
    with open_system(bundle, engine="onnxruntime", keeps=keeps) as system:
        let_devices_look_slow(system.pipeline)
        cache = new_cache(system.manifest, len(PROMPT))
        microbatch = pack_sequence("prompt", PROMPT, cache, None, all_logits=True)
        ((_, result, record),) = system.pipeline.run([microbatch], policy)
        assert result.logits is not None
        np.testing.assert_allclose(result.logits, expected, atol=1e-5)
        summary = summarise([record])
        assert 0 < summary.bs_share <= 1 and summary.bs_experts_ms > 0
        assert sum(block.sent for block in record.blocks) == summary.pairs - summary.dropped
        if keeps == "16":  # nothing is left for the devices, and nothing on the air
            assert summary.bs_share == 1 and summary.bytes_down == summary.bytes_up == 0
            assert all(service.requests == 0 for service in system.services.values())


def test_what_it_keeps_survives_the_loss_of_its_device_and_nothing_else_does(bundle: Path) -> None:
    with open_system(bundle, keeps="16") as system:
        expected = run_sequence(system, PROMPT)
        for k in range(4):
            system.link.peers.pop(f"device-{k}".encode())
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
    with open_system(bundle, keeps="2") as system:  # expert 0 of both blocks; device-0 holds expert 1 as well
        system.link.peers.pop(b"device-0")
        with pytest.raises(DeviceError, match="device-0"):
            run_sequence(system, PROMPT)
    with open_system(bundle, keeps="2", holds=2) as system:  # and the spare copies stand in for the rest
        system.link.peers.pop(b"device-0")
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)


def test_over_real_sockets_answers_are_the_same(bundle: Path, address: str) -> None:
    def score(bs_experts: str) -> tuple[list[tuple[float, ...]], float, str]:
        config = StationConfig(bundle, address, wire="fp32", threads=1, wait_s=20, bs_experts=bs_experts, in_flight=2)
        said: list[str] = []
        with open_station(config, said.append) as station:
            if bs_experts != "none":
                let_devices_look_slow(station.pipeline)
            scorer = DistributedScorer(station.pipeline, Exact(), 2, None)
            answers = scorer.score(QUESTIONS)
            return [a.log_likelihoods for a in answers], summarise(scorer.records).bs_share, " ".join(said)

    expected, share, _ = score("none")
    assert share == 0
    answers, share, said = score("8")
    np.testing.assert_allclose(answers, expected, atol=1e-4)
    assert 0.2 < share < 0.8
    assert "the base station runs 8 experts itself" in said and "no counts (wdmoe-export calibrate" in said
    assert "measured on onnxruntime" in said


# -- virtual time ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, all of whose experts are on one device."""
    folder = tmp_path_factory.mktemp("alone")
    config = ExportConfig(folder / "bundle", devices=1)
    return export_bundle(plan_export(tiny.tiny_checkpoint(folder / "c", "mixtral"), "mixtral", config), config).out


ONE = VirtualConfig(
    ("orin-nano-8gb",), (SLOW_LINK,), cost_shape=MIXTRAL, cost_precision="int4", stage_ms=1.5, bs_machine="h100"
)


def one_token(station: Station) -> Record:
    microbatch = pack_sequence("one", [65], new_cache(station.manifest, 1), None)
    ((_, _, record),) = station.pipeline.run([microbatch], Exact())
    return record


def test_latency_in_virtual_time_is_what_is_worked_out_by_hand(alone: Path) -> None:
    with open_virtual_station(StationConfig(alone, bs_experts="16"), ONE, quiet) as station:
        record = one_token(station)
    call_ms = modelled_station("h100").graph_ms(MIXTRAL.weights, 1)
    assert record.latency_ms == pytest.approx(3 * 1.5 + 2 * 2 * call_ms, rel=1e-9)
    summary = summarise([record])
    assert summary.bs_share == 1 and summary.bytes_down == 0 and summary.waiting_ms == pytest.approx(0)
    assert summary.bs_experts_ms == pytest.approx(4 * call_ms, rel=1e-9)


def test_a_base_station_slower_than_link_and_device_takes_nothing(alone: Path) -> None:
    fast = replace(ONE, devices=("agx-orin-64gb",), links=("ethernet-1g",), bs_machine="laptop-8-core")
    with open_virtual_station(StationConfig(alone, bs_experts="16"), fast, quiet) as station:
        kept = one_token(station)
    with open_virtual_station(StationConfig(alone), fast, quiet) as station:
        plain = one_token(station)
    assert kept.latency_ms == plain.latency_ms and summarise([kept]).bs_rows == 0


def test_memory_in_virtual_time_is_that_of_the_modelled_machine(alone: Path) -> None:
    said: list[str] = []
    laptop = replace(ONE, bs_machine="laptop-8-core")
    with open_virtual_station(StationConfig(alone, bs_experts="auto"), laptop, said.append) as station:
        assert station.kept is not None
        # 32 GB, half of it, 705 MB for each expert in float32: more than the 16 there are
        assert len(station.kept.choice.experts) == 16 and station.kept.profile.origin == "modelled"
    with pytest.raises(WdmoeError, match="--bs-experts 16 takes"):
        huge = replace(ONE, cost_shape=ExpertShape(16384, 53248), cost_precision="int4", devices=("agx-orin-64gb",))
        with open_virtual_station(
            StationConfig(alone, bs_experts="16"), replace(huge, bs_machine="laptop-8-core"), quiet
        ):
            pass


def test_its_experts_hold_up_the_stages_of_others_and_that_is_charged(bundle: Path) -> None:
    """All experts at the base station: there is nothing to overlap, whatever is in flight."""
    four = VirtualConfig(
        ("orin-nano-8gb",) * 4, (SLOW_LINK,), cost_shape=MIXTRAL, cost_precision="int4", bs_machine="h100"
    )

    def total_s(in_flight: int) -> tuple[float, float]:
        config = StationConfig(bundle, threads=1, in_flight=in_flight, bs_experts="16")
        with open_virtual_station(config, four, quiet) as station:
            started_s = station.hub.clock.now_s()
            scorer = DistributedScorer(station.pipeline, Exact(), in_flight, None)
            scorer.score(QUESTIONS)
            busy_ms = sum(r.bs_ms + sum(b.bs_experts_ms for b in r.blocks) for r in scorer.records)
            return station.hub.clock.now_s() - started_s, busy_ms / 1e3

    for in_flight in (1, 3):
        took_s, busy_s = total_s(in_flight)
        assert took_s >= busy_s - 1e-9


def test_the_same_run_takes_the_same_time_to_the_bit(bundle: Path) -> None:
    virtual = VirtualConfig(("orin-nano-8gb",) * 4, ("wifi-5ghz-far",), cost_shape=MIXTRAL, cost_precision="int4")

    def times() -> list[float]:
        with open_virtual_station(StationConfig(bundle, threads=1, bs_experts="6"), virtual, quiet) as station:
            scorer = DistributedScorer(station.pipeline, Wlr(), 1, None)
            scorer.score(QUESTIONS)
            assert summarise(scorer.records).bs_rows > 0
            return [record.latency_ms for record in scorer.records]

    assert times() == times()


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
def test_the_command_tells_what_the_base_station_served(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    options = ["run", "--bundle", str(bundle), "--dataset", "piqa-sample", "--limit", "2", "--clock", "virtual"]
    options += ["--devices", ",".join(["orin-nano-8gb"] * 4), "--link", "wifi-6-far", "--cost-shape", "4096x14336"]
    options += ["--cost-precision", "int4", "--bs-experts", "8", "--bs-machine", "h100"]
    shown = CliRunner().invoke(main, options)
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.stdout.split())
    assert "8 experts at the base station" in words and "rows that the base station ran itself" in words
    assert max(len(line.rstrip()) for line in shown.stdout.splitlines()) <= 80
    path = tmp_path / "a.json"
    assert CliRunner().invoke(main, [*options, "--json", str(path)]).exit_code == 0
    result = json.loads(path.read_text())
    assert result["bs_experts"]["experts"] == 8 and result["bs_experts"]["origin"] == "modelled"
    assert all(0 < entry["bs_share"] < 1 and entry["bs_rows"] > 0 for entry in result["results"])
    changed = CliRunner().invoke(main, [*options[:-4], "--json", str(path)])
    assert "experts at the base station was '8 by" in changed.stderr  # other circumstances: nothing is used again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bs-experts", "some"], "expected a number of experts, auto, or none"),
        (["--bs-experts", "0"], "expected a number of experts, auto, or none"),
        (["--bs-machine", "h100"], "--bs-machine is for modelled devices"),
        (["--bs-counts", __file__], "--bs-counts is for --bs-experts or --bandwidth static"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: list[str], words: str) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    done = CliRunner().invoke(main, ["run", "--dataset", "piqa-sample", *options])
    assert done.exit_code == 2 and words in " ".join(done.output.replace("│", " ").split())
