"""The four troubles, each planted end to end in virtual time, and a run that has none of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main
from wdmoe.bs.diagnosis import diagnose
from wdmoe.bs.evaluation import Evaluation
from wdmoe.bs.experiment import PolicyRun
from wdmoe.bs.records import BlockRecord, DeviceUse, Record, summarise
from wdmoe.bs.results import has_air

FAST = ("--devices", ",".join(["agx-orin-64gb"] * 4), "--link", "ethernet-1g")
ONE_SLOW = ("--devices", "agx-orin-64gb,agx-orin-64gb,agx-orin-64gb,orin-nano-8gb", "--link", "ethernet-1g")
HEAVY = ("--cost-shape", "64x1000000", "--cost-precision", "int4")  # short rows, much to compute
LONG_STAGES = ("--stage-ms", "20")
CLEAN = ("--policy", "exact", *FAST, *LONG_STAGES)


def run(bundle: Path, path: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    station = ["run", "--bundle", str(bundle), "--clock", "virtual", "--dataset", "piqa-sample", "--limit", "8"]
    done = CliRunner().invoke(main, [*station, *options, "--json", str(path)])
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(path.read_bytes())["diagnosis"]
    assert found == [] or "Diagnosis (times modelled)" in done.stdout
    assert all(" ".join(finding["text"].split()) in " ".join(done.stdout.split()) for finding in found)
    return found, done.stdout


def test_a_run_without_trouble_prints_no_diagnosis(bundle: Path, tmp_path: Path) -> None:
    found, shown = run(bundle, tmp_path / "r.json", *CLEAN, "--policy", "bottleneck:budget=0.01", "--in-flight", "2")
    assert found == [] and "Diagnosis" not in shown


@pytest.mark.parametrize(
    ("planted", "kind", "device", "title"),
    [
        (("--policy", "exact", *ONE_SLOW, *HEAVY), "waiting", "device-3", "waiting dominates"),
        (
            ("--policy", "exact", "--devices", FAST[1], "--link", f"ethernet-1g,ethernet-1g,{'radio:mhz=1:efficiency=1'},ethernet-1g"),
            "air", "device-2", "air dominates",
        ),
        (("--policy", "exact", *ONE_SLOW, *HEAVY, "--in-flight", "8"), "queue", "device-3", "a queue grows"),
        ((*CLEAN, "--policy", "top-cut:n=1"), "quality", None, "selection damages quality"),
    ],
)  # fmt: skip
def test_a_planted_cause_is_found(
    bundle: Path, tmp_path: Path, planted: tuple[str, ...], kind: str, device: str | None, title: str
) -> None:
    found, shown = run(bundle, tmp_path / "r.json", *planted)
    finding = next(finding for finding in found if finding["kind"] == kind)
    assert finding["device"] == device and title in shown and f"-> {finding['advice'][:40]}" in shown
    # A cause is told by its own name: the air is no slow device, and the other way round.
    assert len({finding["kind"] for finding in found} & {"waiting", "air"}) == (kind in ("waiting", "air", "queue"))


def test_waiting_for_the_radio_behind_others_is_air(bundle: Path, tmp_path: Path) -> None:
    shared = ("--policy", "exact", "--devices", FAST[1], "--link", "radio:mhz=4:efficiency=1", "--stage-ms", "5")
    found, _ = run(bundle, tmp_path / "r.json", *shared)
    assert [finding["kind"] for finding in found] == ["air"]
    entry = json.loads((tmp_path / "r.json").read_bytes())["results"][0]
    assert entry["queue_ms"] > 0 and found[0]["figures"]["air_share"] > 0.5


def policy_run(
    policy: str, right: list[float], dropped: float = 0.0, log_likelihoods: tuple[float, ...] = ()
) -> PolicyRun:
    block = BlockRecord(4, 2, 4, 1.0, dropped, None, None, waiting_ms=1.0, device_ms=1.0)
    record = Record("q", 7, latency_ms=10.0, bs_ms=9.0, blocks=[block], devices={"d": DeviceUse(1, 7, 1.0)})
    metrics = {"acc": sum(right) / len(right)} if right else {"word_perplexity": math.exp(-sum(log_likelihoods))}
    evaluation = Evaluation(
        "some", "local rows", None, "judge", len(right), len(right), "digest", metrics, dict.fromkeys(metrics, 0.1),
        {"acc": tuple(right)} if right else {}, tuple((value,) for value in log_likelihoods),
    )  # fmt: skip
    return PolicyRun(policy, evaluation, summarise([record] * 8), 1.0, 1.0, None, None)


def kinds(exact: PolicyRun, other: PolicyRun) -> list[str]:
    return [finding.kind for finding in diagnose([exact, other.compared(exact.evaluation)], in_flight=1)]


def test_worse_answers_are_told_from_chance() -> None:
    exact = policy_run("exact", [1.0] * 40)
    assert kinds(exact, policy_run("wlr", [1.0] * 30 + [0.0] * 10)) == ["quality"]
    assert kinds(exact, policy_run("wlr", [1.0] * 38 + [0.0] * 2)) == []  # 5 points worse, by two rows
    assert kinds(policy_run("exact", [0.0] * 10 + [1.0] * 30), policy_run("wlr", [1.0] * 40)) == []  # better


def test_a_text_that_became_less_likely_is_told_from_chance() -> None:
    exact = policy_run("exact", [], log_likelihoods=(-0.30, -0.31, -0.32, -0.33))
    assert kinds(exact, policy_run("wlr", [], log_likelihoods=(-0.33, -0.35, -0.35, -0.37))) == ["quality"]
    assert kinds(exact, policy_run("wlr", [], log_likelihoods=(-0.60, -0.10, -0.32, -0.33))) == []
    assert kinds(exact, policy_run("wlr", [], log_likelihoods=(-0.301, -0.311, -0.321, -0.331))) == []  # within the bar


def test_much_left_out_is_told_without_exact_beside_it() -> None:
    (finding,) = diagnose([policy_run("wlr", [1.0], dropped=0.2)], in_flight=1)
    assert finding.kind == "quality" and "20 % of the gate weight left out" in finding.text
    assert diagnose([policy_run("wlr", [1.0], dropped=0.05)], in_flight=1) == []


def test_the_advice_is_never_what_was_done_already(bundle: Path, tmp_path: Path) -> None:
    shared = ("--devices", FAST[1], "--link", "radio:mhz=4:efficiency=1")
    policies = ("--policy", "exact", "--policy", "bottleneck:budget=0.01")
    found, _ = run(bundle, tmp_path / "r.json", *policies, *shared)
    assert [(f["kind"], f["policy"], "bottleneck" in f["advice"]) for f in found] == [
        ("air", "exact", True),
        ("air", "bottleneck:budget=0.01", False),
    ]
    assert all("--wire int8" in finding["advice"] for finding in found)
    found, _ = run(bundle, tmp_path / "int8.json", *policies, *shared, "--wire", "int8")
    assert found and not any("--wire int8" in finding["advice"] for finding in found)


def test_a_radio_that_several_microbatches_wait_for_is_no_slow_device(bundle: Path, tmp_path: Path) -> None:
    shared = ("--policy", "exact", "--devices", FAST[1], "--link", "radio:mhz=4:efficiency=1", "--in-flight", "4")
    found, shown = run(bundle, tmp_path / "r.json", *shared)
    assert [finding["kind"] for finding in found] == ["air"]
    below = shown[shown.index("air dominates") :].splitlines()[1:]
    assert all(len(line.rstrip()) <= 80 and line.startswith("  ") for line in below if line.strip())


def test_processes_of_one_machine_have_no_air_between_them() -> None:
    waits = BlockRecord(1, 0, 1, 1, 0, None, None, waiting_ms=40.0, device_ms=5.0, air_ms=70.0)
    record = Record("q", 7, latency_ms=100.0, bs_ms=30.0, blocks=[waits], devices={"d": DeviceUse(1, 7, 5.0)})
    run = replace(policy_run("exact", [1.0]), summary=summarise([record]))
    assert [finding.kind for finding in diagnose([run], in_flight=1)] == ["air"]
    assert diagnose([run], in_flight=1, has_air=False) == []
    over = [("loopback", []), ("loopback", ["none"]), ("loopback", ["wifi-6-far"]), ("network", [])]
    assert [has_air({"link": {"kind": kind, "emulated": links}}) for kind, links in over] == [False, False, True, True]


def test_a_queue_is_told_from_the_devices_own_reports() -> None:
    run = policy_run("exact", [1.0])
    records = [
        Record("q", 7, latency_ms=100.0, bs_ms=90.0, blocks=[BlockRecord(1, 0, 1, 1, 0, None, None, device_ms=20.0, queue_ms=30.0)],
               devices={"a": DeviceUse(2, 7, 20.0, 5.0), "b": DeviceUse(1, 7, 20.0, queue_ms)})
        for queue_ms in (10.0, 20.0, 40.0, 50.0)
    ]  # fmt: skip
    queued = replace(run, summary=summarise(records))
    (finding,) = diagnose([queued], in_flight=4)
    assert (finding.kind, finding.device) == ("queue", "b")
    assert finding.figures == {"queue_ms": 30.0, "compute_ms": 20.0, "queue_first_ms": 10.0, "queue_last_ms": 50.0}
    assert "now 4" in finding.advice
    records = [replace(record, devices={"b": DeviceUse(1, 7, 60.0, 30.0)}) for record in records]
    assert diagnose([replace(run, summary=summarise(records))], in_flight=4) == []
