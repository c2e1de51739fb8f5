from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.device.benching import TOKENS, bench
from wdmoe.device.machine import Machine
from wdmoe.profiles.device_profile import DeviceProfile
from wdmoe.runtime.engines import load_engine
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.manifest import DeviceManifest, read_manifest
from wdmoe.runtime.messages import Rows


def benched(bundle: Path, root: Path, engine: NumpyEngine | None = None) -> DeviceProfile:
    folder = bundle / "device-0"
    manifest = read_manifest(folder, DeviceManifest)
    chosen = engine or load_engine("numpy", folder, manifest.experts, 1)
    return bench(chosen, manifest, Machine(root), lambda _: None, tokens=(1, 4, 64), seconds=0.02, weights_bytes=99)


def test_every_count_is_measured_warm_and_cold_with_staging_apart(bundle: Path, tmp_path: Path) -> None:
    profile = benched(bundle, tmp_path)
    assert profile.origin == "measured" and profile.engine == "numpy"
    for table in (profile.points, profile.cold, profile.staging):
        assert [point.tokens for point in table] == [1, 4, 64]
    assert all(0 < point.p50_ms <= point.p95_ms for point in (*profile.points, *profile.cold))
    for staged in profile.staging:
        assert min(staged.convert_ms, staged.gather_ms, staged.weight_ms, staged.sum_ms) > 0
    conditions = profile.conditions
    assert conditions is not None and conditions.rss_bytes is not None and conditions.rss_bytes > 10e6
    assert conditions.weights_bytes == 99 and conditions.throttled == () and conditions.power_mode is None


def test_a_device_that_is_throttled_while_it_is_measured_says_so(bundle: Path, tmp_path: Path) -> None:
    files = {"type": "devfreq-17000000.gpu", "cur_state": "0"}
    cooler = tmp_path / "sys/class/thermal/cooling_device4"
    cooler.mkdir(parents=True)
    for name, text in files.items():
        (cooler / name).write_text(text)
    folder = bundle / "device-0"
    manifest = read_manifest(folder, DeviceManifest)

    class Hot(NumpyEngine):
        def run(self, block: int, expert: int, rows: Rows) -> Rows:
            (cooler / "cur_state").write_text("3" if len(rows) == 64 else "0")
            return super().run(block, expert, rows)

    profile = benched(bundle, tmp_path, Hot(folder, manifest.experts, 1))
    assert profile.conditions is not None
    assert profile.conditions.throttled == ("devfreq-17000000.gpu holds clocks down (state 3)",)


def test_the_counts_go_from_one_to_a_thousand() -> None:
    assert TOKENS[0] == 1 and TOKENS[-1] == 1024 and list(TOKENS) == sorted(TOKENS)


@pytest.mark.parametrize("engine", ["numpy", "onnxruntime"])
def test_other_experts_are_taken_in_turn(bundle: Path, tmp_path: Path, engine: str) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    folder = bundle / "device-0"
    manifest = read_manifest(folder, DeviceManifest)
    loaded = load_engine(engine, folder, manifest.experts, 1)
    called: list[tuple[int, int]] = []

    class Noted:
        name, version, tolerance = loaded.name, loaded.version, loaded.tolerance

        def run(self, block: int, expert: int, rows: Rows) -> Rows:
            called.append((block, expert))
            return loaded.run(block, expert, rows)

    profile = bench(Noted(), manifest, Machine(tmp_path), lambda _: None, tokens=(2,), seconds=0.01)
    assert profile.engine == engine
    assert called[:4] == [(entry.block, entry.expert) for entry in manifest.experts][:4]
