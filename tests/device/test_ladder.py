"""Right before fast: an engine that answers wrong is caught, named, remembered, and the next one serves."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import pytest
import tensorrt_twin
from click.testing import CliRunner, Result
from tensorrt_twin import TensorRTTwin, TwinEngine, swap_plans
from tiny import tiny_checkpoint

from wdmoe.device.checking import Outcome, check_table, exit_code
from wdmoe.device.cli import main
from wdmoe.device.loading import choose_engine, engine_names
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime import engines
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import DeviceManifest, ExpertEntry, read_manifest

LADDER = ("tensorrt", "onnxruntime", "numpy")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    config = ExportConfig(folder / "bundle", precision="int4")
    return export_bundle(plan_export(tiny_checkpoint(folder / "c", "mixtral"), "tiny", config), config).out / "device-1"


@pytest.fixture
def folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A slice on a machine with TensorRT."""
    monkeypatch.setattr(TwinEngine, "twin", TensorRTTwin())
    monkeypatch.setitem(engines.ENGINES, "tensorrt", f"{tensorrt_twin.__name__}:TwinEngine")
    shutil.copytree(exported, tmp_path / "device-1")
    return tmp_path / "device-1"


def chosen(folder: Path, names: tuple[str, ...] = LADDER) -> tuple[str, list[str]]:
    said: list[str] = []
    engine = choose_engine(folder, read_manifest(folder, DeviceManifest), names, 1, said.append)
    return engine.name, said


class OneWeightOff(TwinEngine):
    """Something goes wrong on the way to the GPU: files are right by their hashes, one weight of one expert is not."""

    def _load_weights(self, folder: Path, experts: Sequence[ExpertEntry]) -> dict[tuple[int, int], dict[str, int]]:
        weights = super()._load_weights(folder, experts)
        self.twin.cuda.view(weights[1, 3]["down_proj"], 2)[:] = (0x00, 0x42)  # 3.0
        return weights


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def test_the_best_engine_serves_and_says_what_it_built(folder: Path) -> None:
    name, said = chosen(folder)
    assert name == "tensorrt" and "building 4 of 4 plans" in said[0]
    assert "engine tensorrt 10.16.2.10 (int4): 4 experts, largest error" in said[-1]


def test_a_plan_for_other_weights_is_caught_remembered_and_passed_over(folder: Path) -> None:
    chosen(folder)
    swap_plans(folder)
    name, said = chosen(folder)
    assert name == "onnxruntime"
    assert said[0].startswith("passed over engine tensorrt: self-check failed (4 experts, largest error ")
    built = TwinEngine.twin.built
    name, said = chosen(folder)
    assert name == "onnxruntime" and "`wdmoe-device check` tries it again" in said[0]
    assert TwinEngine.twin.built == built
    with pytest.raises(EngineError, match=r"no engine of tensorrt can serve this slice: engine tensorrt: self-check"):
        chosen(folder, ("tensorrt",))


def test_what_failed_is_remembered_for_its_library_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen(folder)
    swap_plans(folder)
    assert chosen(folder)[0] == "onnxruntime"
    monkeypatch.setattr(TwinEngine, "twin", TensorRTTwin(__version__="10.16.3.1"))
    name, said = chosen(folder)
    assert name == "tensorrt" and "it was made for library 'tensorrt 10.16.2.10'" in said[0]


def test_one_changed_weight_on_its_way_to_the_gpu_is_caught(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(tmp_path / "fp16", precision="fp16")
    half = export_bundle(plan_export(exported.parents[1] / "c", "tiny", config), config).out / "device-1"
    monkeypatch.setattr(TwinEngine, "twin", TensorRTTwin())
    monkeypatch.setitem(engines.ENGINES, "tensorrt", f"{__name__}:OneWeightOff")
    name, said = chosen(half)
    assert name == "onnxruntime" and "passed over engine tensorrt: self-check failed" in said[-2]
    assert "at expert 3 of block 1, allowed 1e-02" in said[-2]


def test_the_identity_of_onnxruntime_holds_its_version_whatever_package_it_is_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("onnxruntime", "onnxruntime-cuda")
    before = [engines.engine_identity(name) for name in names]
    assert all(onnxruntime.__version__ in identity for identity in before)
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    assert all(now != then for now, then in zip(map(engines.engine_identity, names), before, strict=True))


def test_a_damaged_record_of_failures_is_said_and_every_engine_tried(folder: Path) -> None:
    (folder / "engines").mkdir()
    (folder / "engines" / "verdicts.json").write_text('{"failed": 3}')
    name, said = chosen(folder)
    assert name == "tensorrt" and "verdicts.json: cannot be read" in said[0]


def test_check_shows_every_engine_and_tries_what_failed_again(folder: Path) -> None:
    chosen(folder)
    right = min((folder / "engines").glob("*.plan")).read_bytes()
    swap_plans(folder)
    result = invoke("check", "--bundle", folder, "--json")
    assert result.exit_code == 1
    found = {outcome["engine"]: outcome for outcome in json.loads(result.stdout)}
    assert {name: found[name]["verdict"] for name in LADDER} == {
        "tensorrt": "wrong", "onnxruntime": "right", "numpy": "right"
    }  # fmt: skip
    assert found["tensorrt"]["max_error"] > found["tensorrt"]["allowed"] > found["onnxruntime"]["max_error"]
    assert chosen(folder)[0] == "onnxruntime"
    min((folder / "engines").glob("*.plan")).write_bytes(right)
    shown = invoke("check", "--bundle", folder)
    assert shown.exit_code == 0 and "wrong" not in shown.stdout and "max error" in shown.stdout
    assert chosen(folder)[0] == "tensorrt"


def test_check_passes_over_what_is_not_here(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "device-0", tmp_path / "device-0")
    result = invoke("check", "--bundle", tmp_path, "--engine", "tensorrt", "--json")
    (outcome,) = json.loads(result.stdout)
    assert result.exit_code == 1 and outcome["verdict"] == "passed over"
    assert "comes with JetPack" in outcome["reason"] or "this slice is fp32" in outcome["reason"]


def test_build_builds_once_and_anew_when_told_to(folder: Path) -> None:
    first = invoke("build", "--bundle", folder)
    assert first.exit_code == 0 and first.stdout.strip().endswith("ready: tensorrt") and TwinEngine.twin.built == 4
    assert "4 of 4" in first.stderr
    assert invoke("build", "--bundle", folder).exit_code == 0 and TwinEngine.twin.built == 4
    assert invoke("build", "--bundle", folder, "--again").exit_code == 0 and TwinEngine.twin.built == 8


def test_build_says_when_there_is_nothing_to_build(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "device-0", tmp_path / "device-0")
    result = invoke("build", "--bundle", tmp_path / "device-0")
    assert result.exit_code == 0 and "no engine here needs building" in result.stdout
    assert "passed over engine tensorrt" in result.stderr
    assert invoke("build", "--bundle", tmp_path / "device-0", "--engine", "tensorrt").exit_code == 1


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [(["right", "passed over"], 0), (["passed over", "wrong"], 1), (["right", "wrong"], 1), (["passed over"], 1)],
)
def test_the_exit_code_tells_whether_a_device_can_serve(verdicts: list[str], code: int) -> None:
    outcomes = [Outcome("device-0", "e", None, 1, None, None, verdict) for verdict in verdicts]
    assert exit_code(outcomes) == code
    other = Outcome("device-1", "e", None, 1, None, None, "passed over")
    assert exit_code([*outcomes, other]) == 1


def test_the_table_keeps_engines_and_reasons_whole_at_80_columns() -> None:
    from rich.console import Console

    missing = "engine onnxruntime-cuda: no ONNX Runtime with CUDA; install it with: pip install 'wdmoe[cuda]'"
    outcomes = [
        Outcome(f"device-{k}", "onnxruntime-cuda", None, 64, None, None, "passed over", missing) for k in (0, 1)
    ]
    outcomes.append(Outcome("device-1", "tensorrt", "10.13.3.9 (fp16)", 64, 1e-3, 1e-2, "right"))
    outcomes.append(
        Outcome("device-1", "numpy", "2.2.6", 64, 0.3, 1e-4, "wrong", "expert 1 of block 3 is off the most")
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(check_table(outcomes))
    lines = console.export_text().splitlines()
    rows = [line.split() for line in lines if line.startswith("device-") and ":" not in line]
    assert [row[1] for row in rows] == ["onnxruntime-cuda", "onnxruntime-cuda", "tensorrt", "numpy"]
    text = " ".join(" ".join(lines).split())
    assert f"device-0, device-1: {missing}" in text and "10.13.3.9" in text and "(fp16)" in text
    assert "device-1: engine numpy: expert 1 of block 3 is off the most" in text


def test_auto_is_the_ladder() -> None:
    assert tuple(name for name in engine_names("auto") if name in LADDER) == LADDER
