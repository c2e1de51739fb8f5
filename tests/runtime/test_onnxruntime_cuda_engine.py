"""The CUDA engine: its graph and its bindings on the CPU, everything on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tiny import tiny_checkpoint

from wdmoe.device.loading import choose_engine, self_check
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.engines.onnxruntime_cuda_engine import OnnxruntimeCudaEngine
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import PRECISIONS, DeviceManifest, read_manifest

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", params=PRECISIONS)
def slice_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slice")
    # 160 and 72: rows that int4 and int8 pad.
    shape: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 72}
    config = ExportConfig(folder / "bundle", precision=request.param)
    plan = plan_export(tiny_checkpoint(folder / "c", "mixtral", **shape), "tiny", config)
    return export_bundle(plan, config).out / "device-1"


def check_engine(folder: Path, torch_device: Literal["cuda", "cpu"]) -> None:
    manifest = read_manifest(folder, DeviceManifest)
    engine = OnnxruntimeCudaEngine(folder, manifest.experts, 1, torch_device)
    check = self_check(engine, folder, manifest)
    assert check.passed and check.experts == len(manifest.experts), check
    reference = NumpyEngine(folder, manifest.experts, 1)
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 33, 2):  # another size each time: a binding must not keep the last
        rows = rng.standard_normal((tokens, manifest.model.d_model), np.float32)
        for entry in manifest.experts:
            expected = reference.run(entry.block, entry.expert, rows)
            got = engine.run(entry.block, entry.expert, rows)
            assert got.dtype == np.float32 and got.shape == expected.shape
            assert np.abs(got - expected).max() <= engine.tolerance * np.abs(expected).max()


def test_the_engine_answers_as_the_reference_does(slice_folder: Path) -> None:
    check_engine(slice_folder, "cpu")


@pytest.mark.gpu
def test_the_engine_answers_on_the_gpu_as_the_reference_does(slice_folder: Path) -> None:
    manifest = read_manifest(slice_folder, DeviceManifest)
    try:
        OnnxruntimeCudaEngine(slice_folder, manifest.experts[:1], 1)
    except EngineError as error:
        pytest.skip(str(error))
    check_engine(slice_folder, "cuda")


def test_another_experts_weights_are_not_taken_for_its_own(slice_folder: Path) -> None:
    manifest = read_manifest(slice_folder, DeviceManifest)
    engine = OnnxruntimeCudaEngine(slice_folder, manifest.experts, 1, "cpu")
    rows = np.ones((1, manifest.model.d_model), np.float32)
    answers = [engine.run(entry.block, entry.expert, rows) for entry in manifest.experts]
    again = [engine.run(entry.block, entry.expert, rows) for entry in reversed(manifest.experts)]
    for first, second in zip(answers, reversed(again), strict=True):
        np.testing.assert_array_equal(first, second)
    assert len({answer.tobytes() for answer in answers}) == len(answers)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_without_cuda_it_says_so_and_the_next_engine_is_taken(slice_folder: Path) -> None:
    manifest = read_manifest(slice_folder, DeviceManifest)
    with pytest.raises(EngineError, match=r"engine onnxruntime-cuda: .* built without CUDA; .*wdmoe\[cuda\]"):
        OnnxruntimeCudaEngine(slice_folder, manifest.experts, 1)
    said: list[str] = []
    chosen = choose_engine(slice_folder, manifest, ("onnxruntime-cuda", "numpy"), 1, said.append)
    assert chosen.name == "numpy" and "passed over engine onnxruntime-cuda" in said[0]


def test_a_slice_of_unequal_experts_is_refused(tmp_path: Path) -> None:
    folders: list[Path] = []
    for precision in ("fp16", "int8"):
        config = ExportConfig(tmp_path / precision, precision=precision)
        checkpoint = tiny_checkpoint(tmp_path / f"c-{precision}", "mixtral")
        folders.append(export_bundle(plan_export(checkpoint, "tiny", config), config).out / "device-0")
    manifest, other = (read_manifest(folder, DeviceManifest) for folder in folders)
    target = folders[0] / manifest.experts[1].weights
    target.unlink()
    target.write_bytes((folders[1] / other.experts[1].weights).read_bytes())
    with pytest.raises(EngineError, match="another shape or precision"):
        OnnxruntimeCudaEngine(folders[0], manifest.experts, 1, "cpu")
