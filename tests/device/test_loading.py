from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from wdmoe.device.loading import choose_engine, engine_names, kept_profile, quick_profile, self_check
from wdmoe.device.main import device_folders
from wdmoe.profiles.device_profile import encode_profile
from wdmoe.runtime import engines
from wdmoe.runtime.engines import ENGINES, load_engine
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.errors import BundleError, EngineError
from wdmoe.runtime.manifest import DeviceManifest, ExpertEntry, read_manifest, verify_files


class OneWeightOff(NumpyEngine):
    """An engine with a fault that only shows in its numbers."""

    name = "one-weight-off"

    def __init__(self, folder: Path, experts: Sequence[ExpertEntry], threads: int) -> None:
        super().__init__(folder, experts, threads)
        last = max(self._weights)
        down = self._weights[last][2]
        assert isinstance(down, np.ndarray)
        down[0, 0] += 0.5


class Speechless(NumpyEngine):
    """An engine that answers with what is no number."""

    def run(self, block: int, expert: int, rows: np.ndarray) -> np.ndarray:
        return np.full_like(rows, np.nan)


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "tensorrt"])  # it has tests of its own
def test_every_engine_gives_the_golden_outputs(any_bundle: Path, name: str) -> None:
    folder = any_bundle / "device-2"
    manifest = read_manifest(folder, DeviceManifest)
    try:
        engine = load_engine(name, folder, manifest.experts, 1)
    except EngineError as error:
        if name in ("numpy", "onnxruntime"):  # the others need hardware of their own
            raise
        pytest.skip(str(error))
    check = self_check(engine, folder, manifest)
    assert check.passed and check.experts == 4 and check.max_error < 1e-5


@pytest.mark.parametrize("faulty", [OneWeightOff, Speechless])
def test_a_wrong_engine_is_caught_named_and_passed_over(
    bundle: Path, faulty: type[NumpyEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(engines.ENGINES, "faulty", f"{faulty.__module__}:{faulty.__name__}")
    folder = tmp_path / "device-0"
    shutil.copytree(bundle / "device-0", folder)
    manifest = read_manifest(folder, DeviceManifest)
    said: list[str] = []
    engine = choose_engine(folder, manifest, ("faulty", "numpy"), 1, said.append)
    assert engine.name == "numpy"
    assert "passed over engine faulty: self-check failed" in said[0]
    with pytest.raises(EngineError, match="no engine of faulty can serve this slice: engine faulty: self-check"):
        choose_engine(folder, manifest, ("faulty",), 1, said.append)


def test_a_golden_file_without_an_expert_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "device-0"
    shutil.copytree(bundle / "device-0", folder)
    shutil.copy(bundle / "device-1" / "golden.safetensors", folder / "golden.safetensors")
    manifest = read_manifest(folder, DeviceManifest)
    with pytest.raises(BundleError, match=r"golden.safetensors: has no 'output.block_00.expert_00'"):
        self_check(load_engine("numpy", folder, manifest.experts, 1), folder, manifest)
    with pytest.raises(BundleError, match=r"golden.safetensors: sha256 is"):
        verify_files(folder, manifest)


def test_a_profile_is_measured_for_the_shape_it_speaks_of(bundle: Path) -> None:
    folder = bundle / "device-0"
    manifest = read_manifest(folder, DeviceManifest)
    profile = quick_profile(load_engine("numpy", folder, manifest.experts, 1), manifest)
    assert (profile.d_model, profile.d_ff, profile.origin) == (32, 24, "measured")
    assert all(0 < point.p50_ms <= point.p95_ms for point in profile.points)


def test_auto_tries_every_engine_and_a_name_only_itself() -> None:
    assert engine_names("auto") == tuple(ENGINES)
    assert engine_names("numpy") == ("numpy",)
    with pytest.raises(ValueError, match="unknown engine 'gpu'"):
        engine_names("gpu")


def test_a_bundle_stands_for_its_device_folders_in_order(bundle: Path, tmp_path: Path) -> None:
    assert device_folders(bundle / "device-2") == [bundle / "device-2"]
    assert [folder.name for folder in device_folders(bundle)] == [f"device-{k}" for k in range(4)]
    with pytest.raises(BundleError, match="no device-K folders"):
        device_folders(tmp_path)


def test_a_kept_profile_serves_where_it_was_measured_and_nowhere_else(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle / "device-0", DeviceManifest)
    engine, path = load_engine("numpy", bundle / "device-0", manifest.experts, 1), tmp_path / "here.json"
    profile = quick_profile(engine, manifest)
    assert profile.staging_ms > 0
    path.write_bytes(encode_profile(profile))
    assert kept_profile(path, engine, manifest) == profile
    for field, value in (("device", "another board"), ("engine", "tensorrt"), ("d_ff", 1)):
        path.write_bytes(encode_profile(msgspec.structs.replace(profile, **{field: value})))
        with pytest.raises(ValueError, match="measure again with wdmoe-device bench"):
            kept_profile(path, engine, manifest)
