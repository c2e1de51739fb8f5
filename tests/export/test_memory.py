"""The exporter's memory does not grow with the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint

CODE = """
import re, sys
from pathlib import Path
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
config = ExportConfig(Path(sys.argv[2]), workers=2)
export_bundle(plan_export(Path(sys.argv[1]), "tiny", config), config)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_six_blocks_need_no_more_memory_than_one(tmp_path: Path) -> None:
    peaks_kb: list[int] = []
    for blocks in (1, 6):
        folder = tmp_path / f"c{blocks}"
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": blocks}
        tiny_checkpoint(folder, "mixtral", dtype="bfloat16", **shape)
        line = [sys.executable, "-c", CODE, str(folder), str(tmp_path / f"b{blocks}")]
        peaks_kb.append(int(subprocess.run(line, capture_output=True, text=True, check=True, timeout=100).stdout))
    weights_kb = 5 * 8 * 3 * 256 * 2048 * 2 / 1024  # of the five blocks more: 123 MB
    assert peaks_kb[1] - peaks_kb[0] < 0.15 * weights_kb, peaks_kb
