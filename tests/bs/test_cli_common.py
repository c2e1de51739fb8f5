"""`--policy auto`: what it stands for is told, shown and kept under its own name by every command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from wdmoe.bs.cli import main
from wdmoe.bs.policies import Sensitivity, resolve_auto
from wdmoe.bs.sensitivity import FORMAT, VERSION, SensitivityFile, write_sensitivity
from wdmoe.bs.trace import TRACE_FORMAT, TRACE_VERSION, Trace, TraceInfo, read_trace, write_trace
from wdmoe.runtime.manifest import SENSITIVITY_NAME, BsManifest, read_manifest

CALIBRATED = resolve_auto("auto", calibrated=True)
MODELLED = ("--clock", "virtual", "--devices", ",".join(["orin-nx-8gb"] * 4), "--link", "wifi-6")


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that may be calibrated."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def calibrate(bundle: Path) -> None:
    """Say that a lost pair costs next to nothing, so that the loss lets something go."""
    manifest = read_manifest(bundle / "bs", BsManifest)
    n_blocks = manifest.model.n_blocks
    blocks = (Sensitivity(nats=1e-3, share=1 / n_blocks),) * n_blocks
    write_sensitivity(bundle / "bs", SensitivityFile(FORMAT, VERSION, manifest.bundle_id, 128, {"weight": blocks}))


def invoke(command: str, *options: object) -> Result:
    return CliRunner().invoke(main, [command, *map(str, options)])


def run(bundle: Path, *options: object) -> Result:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    return invoke("run", "--bundle", bundle, "--dataset", "piqa-sample", "--limit", 2, *MODELLED, *options)


def policies_of(path: Path) -> list[str]:
    return [result["policy"] for result in json.loads(path.read_text())["results"]]


def test_a_resumed_run_keeps_what_auto_stood_for(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = run(own, "--policy", "auto", "--policy", "exact", "--json", path)
    assert first.exit_code == 0, first.output
    assert f"auto: bottleneck, with its default budget: {own} is not calibrated; wdmoe-bs calibrate" in first.stderr
    assert "under exact, bottleneck" in first.stderr and "bottleneck" in first.stdout
    assert policies_of(path) == ["exact", "bottleneck"]

    again = run(own, "--policy", "auto", "--json", path)
    assert "piqa-sample under bottleneck is there already" in again.stderr

    # Once the bundle is calibrated auto is another policy; what it was before keeps its name.
    calibrate(own)
    calibrated = run(own, "--policy", "auto", "--json", path)
    assert calibrated.exit_code == 0, calibrated.output
    assert f"auto: {CALIBRATED}\n" in calibrated.stderr and "there already" not in calibrated.stderr
    kept = json.loads(path.read_text())["results"]
    assert sorted(result["policy"] for result in kept) == sorted(["exact", "bottleneck", CALIBRATED])
    assert next(result for result in kept if result["policy"] == CALIBRATED)["dropped_share"] > 0
    assert f"under {CALIBRATED} is there already" in run(own, "--policy", "auto", "--json", path).stderr
    assert f"under {CALIBRATED} is there already" in run(own, "--policy", CALIBRATED, "--json", path).stderr


def test_a_page_names_what_auto_stood_for(own: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    calibrate(own)
    done = run(own, "--policy", "auto", "--report", tmp_path / "r.html", "--json", "-")
    assert done.exit_code == 0, done.output
    assert f"<td>{CALIBRATED}</td>" in (tmp_path / "r.html").read_text()


def test_quality_and_generate_take_auto(own: Path, address: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    calibrate(own)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2/test.txt").write_text(" = Ice = \n Ice floats . \n" * 20)
    path = tmp_path / "r.json"
    station = ("--bundle", own, "--listen", address, "--wait", 20, "--policy", "auto", "--json", path)
    judged = invoke(
        "quality", *station, "--data-dir", tmp_path, "--dataset", "piqa-sample", "--rows", 2, "--tokens", 40
    )
    assert judged.exit_code == 0, judged.output
    assert f"auto: {CALIBRATED}\n" in judged.stderr and policies_of(path) == [CALIBRATED]
    written = invoke("generate", *station, "--prompt", "Ice", "--max-tokens", 3)
    assert written.exit_code == 0, written.output
    assert f"auto: {CALIBRATED}\n" in written.stderr and json.loads(path.read_text())["policy"] == CALIBRATED


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Ten tokens of two blocks with four experts."""
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), (2, 10)).astype(np.float16)
    info = TraceInfo(TRACE_FORMAT, TRACE_VERSION, "0", "m", "b" * 64, 2, True, {"invented": 1}, {})
    placement = np.tile(np.arange(4), (2, 1))
    path = tmp_path / "t.npz"
    write_trace(path, Trace(info, probabilities, np.array([0, 10]), np.full((2, 4), 5), placement))
    return path


def test_a_simulation_goes_by_the_calibration_in_its_trace(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = invoke("simulate", "--trace", trace, "--devices", "orin-nx-8gb*4", "--policy", "auto", "--json", path)
    assert done.exit_code == 0, done.output
    assert "auto: bottleneck, with its default budget: the trace is of a bundle that was not calibrated" in done.stderr
    assert policies_of(path) == ["bottleneck"]

    known = read_trace(trace)
    mind = {"weight": (Sensitivity(0.02, 0.5),) * 2}
    write_trace(trace, dataclasses.replace(known, info=msgspec.structs.replace(known.info, sensitivity=mind)))
    done = invoke("simulate", "--trace", trace, "--devices", "orin-nx-8gb*4", "--policy", "auto", "--json", path)
    assert f"auto: {CALIBRATED}\n" in done.stderr and policies_of(path) == [CALIBRATED]


@pytest.mark.parametrize("command", ["run", "quality", "generate", "simulate"])
def test_options_of_auto_are_refused(own: Path, trace: Path, command: str) -> None:
    calibrate(own)
    options = {
        "run": ("--bundle", own, "--dataset", "piqa-sample"),
        "quality": ("--bundle", own),
        "generate": ("--bundle", own, "--prompt", "Ice"),
        "simulate": ("--trace", trace, "--devices", "orin-nx-8gb*4"),
    }[command]
    done = invoke(command, *options, "--policy", "auto:loss=0.02")
    assert done.exit_code == 2 and "policy auto takes no options, got 'auto:loss=0.02'" in done.stderr
    assert "waiting" not in done.stderr


@pytest.mark.parametrize("command", ["run", "quality", "generate", "simulate"])
def test_a_loss_without_a_calibration_is_refused_before_anything_runs(own: Path, trace: Path, command: str) -> None:
    options = {
        "run": ("--bundle", own, "--dataset", "piqa-sample", "--policy", "exact"),
        "quality": ("--bundle", own),
        "generate": ("--bundle", own, "--prompt", "Ice"),
        "simulate": ("--trace", trace, "--devices", "orin-nx-8gb*4"),
    }[command]
    done = invoke(command, *options, "--policy", "bottleneck:loss=0.02")
    assert done.exit_code == 2 and "not calibrated for loss= with importance=weight" in " ".join(done.stderr.split())
    assert "waiting" not in done.stderr and "rows" not in done.stderr.partition("Error")[0]


def test_a_damaged_calibration_is_told_before_anything_runs(own: Path) -> None:
    (own / "bs" / SENSITIVITY_NAME).write_text("{}")
    done = invoke("generate", "--bundle", own, "--prompt", "Ice", "--policy", "auto")
    assert done.exit_code == 1 and "make it again with wdmoe-bs calibrate, or remove it" in done.stderr
    assert "waiting" not in done.stderr
