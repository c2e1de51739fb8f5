"""Every experiment in its short form on a tiny random model, run once for all tests that look at it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "scripts" / "experiments"


def short_result(name: str, work: Path) -> dict[str, Any]:
    """Run an experiment, or find it done; return what it wrote, and what it printed as `printed`.

    Args:
        name: of its module.
        work: where results, plots and what experiments share are kept.
    """
    pytest.importorskip("matplotlib", reason="needs the extra `eval`")
    target, printed = work / f"{name}.json", work / f"{name}.printed"
    if not printed.exists():
        line = [sys.executable, str(FOLDER / f"{name}.py"), "--short", "--model", "tiny", "--work", str(work)]
        line += ["--json", str(target), "--plot", str(work / f"{name}.png")]
        done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        printed.write_text(done.stdout)
    return {**json.loads(target.read_bytes()), "printed": printed.read_text()}
