"""A slice that is too large as float32 is served in the memory of its files, by the engine that can."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

from wdmoe.device.loading import self_check
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.engines.onnxruntime_engine import OnnxruntimeEngine
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import PRECISIONS, QUANTISED, DeviceManifest, read_manifest
from wdmoe.runtime.memory import available_memory_bytes


@pytest.fixture(scope="module", params=PRECISIONS)
def slice_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slice")
    config = ExportConfig(folder / "bundle", precision=request.param)
    return export_bundle(plan_export(tiny_checkpoint(folder / "c", "mixtral"), "tiny", config), config).out / "device-1"


def test_numpy_converts_at_use_where_float32_does_not_fit(slice_folder: Path) -> None:
    manifest = read_manifest(slice_folder, DeviceManifest)
    large, small = (NumpyEngine(slice_folder, manifest.experts, 1, free_bytes) for free_bytes in (10**9, 1000))
    assert (large.converts_at_use, small.converts_at_use) == (False, True)
    rows = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    np.testing.assert_allclose(small.run(1, 3, rows), large.run(1, 3, rows), rtol=1e-5, atol=1e-6)
    assert self_check(small, slice_folder, manifest).passed


def test_onnxruntime_refuses_what_does_not_fit(slice_folder: Path) -> None:
    manifest = read_manifest(slice_folder, DeviceManifest)
    with pytest.raises(
        EngineError, match=r"holds weights as (float32|stored), 0\.0 GB for this slice, 0\.0 GB are free"
    ):
        OnnxruntimeEngine(slice_folder, manifest.experts, 1, free_bytes=1000)
    assert self_check(OnnxruntimeEngine(slice_folder, manifest.experts, 1), slice_folder, manifest).passed


def test_quantised_experts_do_without_the_kernels_of_arm_that_are_off_by_percents(slice_folder: Path) -> None:
    manifest = read_manifest(slice_folder, DeviceManifest)
    (session, *_) = OnnxruntimeEngine(slice_folder, manifest.experts, 1)._sessions.values()
    options = session.get_session_options()
    if manifest.precision in QUANTISED:
        assert options.get_session_config_entry("mlas.disable_kleidiai") == "1"
    else:
        with pytest.raises(RuntimeError, match=r"mlas\.disable_kleidiai"):
            options.get_session_config_entry("mlas.disable_kleidiai")


LOAD = """
import re, sys
from pathlib import Path
from wdmoe.device.loading import self_check
from wdmoe.runtime.engines.onnxruntime_engine import OnnxruntimeEngine
from wdmoe.runtime.manifest import DeviceManifest, read_manifest
import onnxruntime
def own_kb():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
folder = Path(sys.argv[1])
manifest, before_kb = read_manifest(folder, DeviceManifest), own_kb()
engine = OnnxruntimeEngine(folder, manifest.experts, 1)
assert self_check(engine, folder, manifest).passed
print(own_kb() - before_kb)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnxruntime_keeps_quantised_weights_as_stored(tmp_path: Path, precision: Any) -> None:
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    config = ExportConfig(tmp_path / "bundle", experts_per_device=8, precision=precision)
    export_bundle(plan_export(tiny_checkpoint(tmp_path / "c", "mixtral", **shape), "tiny", config), config)
    line = [sys.executable, "-c", LOAD, str(config.out / "device-0")]
    held_kb = int(subprocess.run(line, capture_output=True, text=True, check=True, timeout=100).stdout)
    stored_kb = sum(path.stat().st_size for path in (config.out / "experts").iterdir()) / 1024
    assert held_kb < 1.3 * stored_kb + 12_000  # as float32: 4 x or 7.75 x; 12 MB for ONNX Runtime itself


def test_free_memory_is_unknown_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path / "meminfo") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert available_memory_bytes(tmp_path / "meminfo") == 5120
