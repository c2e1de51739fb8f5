"""What Mixtral-size experts cost on the CPU, in memory and for one token, against what their weights dictate.

    python scripts/bench/engine_cpu.py --json -

A device with two experts of random weights, exported as fp16 and as int4, each loaded by a process of its own. Memory is what
that process grew by, resident, from before the engine was loaded to after a call of each expert. The floor of a call is the
packed bytes of an expert over the rate at which as many threads as the engine has read memory that is as large as all its
experts; calls and readings take turns, and what counts is the median over the turns of time over floor: the rate of a machine
that others share comes and goes. Where others took more than a twentieth of the processors, it is measured again. Bars: fp16
<= 1.35 x the bytes as float32 (what ONNX Runtime computes with), int4 <= 1.35 x the packed bytes, one token with int4 <= 1.5 x
the floor. Exit code 1 if one is missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import exit_on_sigterm

from scripts.bench._environment import environment, progress, undisturbed, write_json
from scripts.bench._experts import N_EXPERTS, export_experts
from wdmoe.device.cli_tools import read_shape
from wdmoe.device.config import DeviceConfig
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.engines.onnxruntime_engine import OnnxruntimeEngine
from wdmoe.runtime.manifest import DeviceManifest, Precision, read_manifest
from wdmoe.runtime.memory import resident_bytes

BARS = {"fp16_rss_over_fp32_bytes": 1.35, "int4_rss_over_packed_bytes": 1.35, "int4_time_over_floor": 1.5}
PRECISIONS: tuple[Precision, ...] = ("fp16", "int4")
_CHILD_LIMIT_S = 300.0
_ATTEMPTS = 4


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--shape", metavar="DxF", default="4096x14336", show_default=True, callback=read_shape)
@click.option(
    "--threads", type=click.IntRange(min=1), default=DeviceConfig().threads, show_default=True,
    help="Of the engine, and of the reading that makes the floor.",
)  # fmt: skip
@click.option("--calls", type=click.IntRange(min=2), default=600, show_default=True, help="Timed in one measurement.")
@click.option("--child", type=click.Path(path_type=Path), hidden=True, help="Measure this folder and print the result.")
def main(target: str | None, shape: ExpertShape, threads: int, calls: int, child: Path | None) -> None:
    """Measure memory and time of experts on the CPU; exit code 1 if a bar is missed."""
    if child is not None:
        click.echo(json.dumps(measure(child, threads, calls)))
        return
    exit_on_sigterm()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="wdmoe-engine-cpu-") as scratch:
        for precision, folder in export_experts(Path(scratch), shape, PRECISIONS):
            line = [sys.executable, __file__, "--child", str(folder), "--threads", str(threads), "--calls", str(calls)]
            done = subprocess.run(line, capture_output=True, text=True, timeout=_CHILD_LIMIT_S, check=False)
            if done.returncode:
                raise click.ClickException(f"{precision}: {done.stderr[-2000:]}")
            found[precision] = json.loads(done.stdout)
            progress(f"{precision}: {describe(found[precision])}")
    fp32_bytes = N_EXPERTS * 4 * shape.weights
    ratios = {
        "fp16_rss_over_fp32_bytes": found["fp16"]["rss_bytes"] / fp32_bytes,
        "int4_rss_over_packed_bytes": found["int4"]["rss_bytes"] / found["int4"]["packed_bytes"],
        "int4_time_over_floor": found["int4"]["time_over_floor"],
    }
    missed = [name for name, bar in BARS.items() if ratios[name] > bar]
    result = {
        **ratios,
        "bars": BARS,
        "passed": not missed,
        "missed": missed,
        "shape": f"{shape.d_model}x{shape.d_ff}",
        "experts": N_EXPERTS,
        "threads": threads,
        "precisions": found,
        **environment(("numpy", "onnxruntime")),
    }
    if target is not None:
        write_json(target, result)
    progress(", ".join(f"{name} {ratios[name]:.3f} (bar {bar})" for name, bar in BARS.items()))
    sys.exit(1 if missed else 0)


def measure(folder: Path, threads: int, calls: int) -> dict[str, Any]:
    """Load the experts of a folder, and measure memory and calls of one token."""
    import onnxruntime as ort  # what the library itself takes is not the weights'

    ort.get_available_providers()
    manifest = read_manifest(folder, DeviceManifest)
    packed_bytes = sum(manifest.files[entry.weights].size_bytes for entry in manifest.experts)
    row = np.random.default_rng(0).standard_normal((1, manifest.model.d_model), np.float32)
    before_bytes = resident_bytes()
    engine = OnnxruntimeEngine(folder, manifest.experts, threads)
    for entry in manifest.experts:
        engine.run(entry.block, entry.expert, row)
    after_bytes = resident_bytes()
    if before_bytes is None or after_bytes is None:
        raise click.ClickException("this system does not say what a process holds in memory (/proc/self/statm)")
    swept = np.ones(packed_bytes // 4, np.float32)
    parts = np.array_split(swept, threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> tuple[list[float], list[float]]:
            call_ms: list[float] = []
            gb_per_s: list[float] = []
            for number in range(calls - calls % len(manifest.experts)):
                entry = manifest.experts[number % len(manifest.experts)]
                started_s = time.perf_counter()
                engine.run(entry.block, entry.expert, row)
                call_ms.append((time.perf_counter() - started_s) * 1e3)
                if number % len(manifest.experts) == len(manifest.experts) - 1:
                    started_s = time.perf_counter()
                    list(pool.map(np.sum, parts))
                    gb_per_s.append(swept.nbytes / (time.perf_counter() - started_s) / 1e9)
            return call_ms, gb_per_s

        once()
        (call_ms, gb_per_s), disturbance = undisturbed(once, _ATTEMPTS)
    rate, expert_bytes = float(np.median(gb_per_s)), packed_bytes / len(manifest.experts)
    return {
        "rss_bytes": after_bytes - before_bytes,
        "packed_bytes": packed_bytes,
        "call_ms": float(np.median(call_ms)),
        "call_p05_ms": float(np.percentile(call_ms, 5)),
        "call_p95_ms": float(np.percentile(call_ms, 95)),
        "read_gb_per_s": rate,
        "read_p95_gb_per_s": float(np.percentile(gb_per_s, 95)),
        "floor_ms": expert_bytes / rate / 1e6,
        "time_over_floor": time_over_floor(call_ms, gb_per_s, expert_bytes),
        **disturbance,
    }


def time_over_floor(call_ms: Sequence[float], gb_per_s: Sequence[float], expert_bytes: float) -> float:
    """Return the median over the turns of what a call took over what reading an expert takes at the rate of that turn.

    Args:
        call_ms: of one turn after the other, the same number in each.
        gb_per_s: read in each turn.
        expert_bytes: that a call reads.
    """
    turns_ms = np.array(call_ms).reshape(len(gb_per_s), -1).mean(axis=1)
    return float(np.median(turns_ms * np.array(gb_per_s) * 1e6 / expert_bytes))


def describe(found: dict[str, Any]) -> str:
    """Put a measurement on one line."""
    return (
        f"{found['rss_bytes'] / 1e6:.0f} MB for {found['packed_bytes'] / 1e6:.0f} MB of files, one token "
        f"{found['call_ms']:.2f} ms; {found['read_gb_per_s']:.1f} GB/s read one expert's file in {found['floor_ms']:.2f} ms"
    )


if __name__ == "__main__":
    main()
