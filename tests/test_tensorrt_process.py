"""A device process on a machine with TensorRT (the twin): a fault planted in its plans, and what the base station gets."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from guarded import answer
from processes import command, free_address, stop
from tensorrt_twin import TensorRTTwin, TwinEngine, swap_plans
from tiny import tiny_checkpoint

from wdmoe.bs.config import StationConfig
from wdmoe.bs.routing import Floats
from wdmoe.bs.station import open_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.runtime.manifest import DeviceManifest, read_manifest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
WITH_TENSORRT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from wdmoe.runtime.engines import ENGINES
ENGINES["tensorrt"] = "tensorrt_twin:TwinEngine"
from wdmoe.device.cli import main
main()
"""


@contextmanager
def devices(bundle: Path, address: str, logs: Path) -> Iterator[None]:
    """Run all devices on numpy, but device-1 on the best engine that it finds."""
    running = []
    try:
        for folder in sorted(bundle.glob("device-*")):
            options = ["--bundle", str(folder), "--bs", address]
            if folder.name == "device-1":
                line = [sys.executable, "-c", WITH_TENSORRT, *options]
            else:
                line = command("wdmoe-device", *options, "--engine", "numpy")
            with (logs / f"{folder.name}.log").open("wb") as out:
                running.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
        yield
    finally:
        stop(running)


def answered(bundle: Path, logs: Path) -> tuple[Floats, str]:
    """Return the logits of a prompt, and what device-1 said."""
    logs.mkdir()
    config = StationConfig(bundle=bundle, listen=free_address(), wire="fp32", threads=1, wait_s=30)
    with devices(bundle, config.listen, logs), open_station(config, lambda _: None) as station:
        deadline_s = time.monotonic() + 30
        while len(station.hub.devices) < 4:
            assert time.monotonic() < deadline_s, (logs / "device-1.log").read_text()
            station.pipeline.idle(0.05)
        return answer(station), (logs / "device-1.log").read_text()


def test_a_plan_for_other_weights_is_named_and_the_answers_stay_right(tmp_path: Path) -> None:
    config = ExportConfig(tmp_path / "bundle", precision="int4")
    bundle = export_bundle(plan_export(tiny_checkpoint(tmp_path / "c", "mixtral"), "tiny", config), config).out
    folder = bundle / "device-1"
    experts = read_manifest(folder, DeviceManifest).experts
    TwinEngine.twin = TensorRTTwin()
    said: list[str] = []
    TwinEngine.prepare(folder, experts, said.append)

    with_tensorrt, log = answered(bundle, tmp_path / "first")
    assert (
        "device-1: engine tensorrt 10.16.2.10 (int4): 4 experts" in log and "building" not in log
    )  # taken as they were
    swap_plans(folder)
    without, log = answered(bundle, tmp_path / "second")
    assert "device-1: passed over engine tensorrt: self-check failed (4 experts, largest error" in log
    assert "device-1: engine onnxruntime" in log
    again, log = answered(bundle, tmp_path / "third")
    assert "`wdmoe-device check` tries it again" in log and "device-1: engine onnxruntime" in log

    shutil.rmtree(folder / "engines")
    scale = np.abs(without).max()
    assert np.abs(again - without).max() < 1e-5 * scale
    assert 0 < np.abs(with_tensorrt - without).max() < 1e-2 * scale  # float16 rows, and nothing worse
