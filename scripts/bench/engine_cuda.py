"""The CUDA engine on Mixtral-size experts: error against numpy, and time against what reading the weights takes.

    pip install 'wdmoe[cuda]' && python scripts/bench/engine_cuda.py --json -

Two experts of random weights in fp16, int8 and int4. The error is the largest difference from the numpy engine, relative to the
largest value. The floor of a call is the bytes of an expert's file over the rate of the GPU's memory, measured in the same run
(the negation of 1 GB, read and written); a call takes rows from the memory of the CPU and brings answers back, as in service.
Exit code 1 if an error exceeds what the engine is allowed, 2 if there is no GPU that the engine runs on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import exit_on_sigterm

from scripts.bench._environment import CpuUse, environment, progress, write_json
from scripts.bench._experts import export_experts
from wdmoe.device.cli_tools import read_shape
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.engines.onnxruntime_cuda_engine import OnnxruntimeCudaEngine
from wdmoe.runtime.errors import EngineError
from wdmoe.runtime.manifest import DeviceManifest, Precision, read_manifest

PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "int4")
TOKENS = (1, 4, 16, 64, 256)
_CHECKED_TOKENS = 16
_UNTIMED_CALLS, _CALLS = 5, 40
_COPIED = 1 << 29  # float16


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--shape", metavar="DxF", default="4096x14336", show_default=True, callback=read_shape)
@click.option("--tokens", "counts", type=click.IntRange(min=1), multiple=True, default=TOKENS, show_default=True)
@click.option(
    "--on", "torch_device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
    help="cpu tries this script where there is no GPU; its times mean nothing.",
)  # fmt: skip
def main(target: str | None, shape: ExpertShape, counts: Sequence[int], torch_device: Literal["cuda", "cpu"]) -> None:
    """Measure the CUDA engine; exit code 1 if it is wrong."""
    exit_on_sigterm()
    found: dict[str, Any] = {}
    use = CpuUse()
    with tempfile.TemporaryDirectory(prefix="wdmoe-engine-cuda-") as scratch:
        for precision, folder in export_experts(Path(scratch), shape, PRECISIONS):
            manifest = read_manifest(folder, DeviceManifest)
            try:
                engine = OnnxruntimeCudaEngine(folder, manifest.experts, 1, torch_device)
            except EngineError as error:
                progress(str(error))
                sys.exit(2)
            if not found:
                rate = memory_gb_per_s(torch_device)
                progress(f"memory: {rate:.0f} GB/s")
            found[precision] = measure(engine, folder, manifest, counts, rate)
            progress(f"{precision}: {describe(found[precision])}")
    wrong = [precision for precision, of in found.items() if not of["max_error"] <= of["tolerance"]]
    result = {
        "max_error": max(of["max_error"] for of in found.values()),
        "worst_one_token_time_over_floor": max(of["points"][0]["time_over_floor"] for of in found.values()),
        "passed": not wrong,
        "wrong": wrong,
        "on": torch_device,
        "engine": engine.version,
        "memory_gb_per_s": rate,
        "shape": f"{shape.d_model}x{shape.d_ff}",
        "precisions": found,
        **use.since(),
        **environment(("numpy",)),
    }
    if target is not None:
        write_json(target, result)
    sys.exit(1 if wrong else 0)


def measure(
    engine: OnnxruntimeCudaEngine, folder: Path, manifest: DeviceManifest, counts: Sequence[int], rate: float
) -> dict[str, Any]:
    """Compare the engine with numpy, then time calls that take the experts in turn."""
    reference, rng = NumpyEngine(folder, manifest.experts, 1), np.random.default_rng(0)
    rows = rng.standard_normal((_CHECKED_TOKENS, manifest.model.d_model), np.float32)
    worst = 0.0
    for entry in manifest.experts:
        expected = reference.run(entry.block, entry.expert, rows)
        got = engine.run(entry.block, entry.expert, rows)
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    del reference
    expert_bytes = sum(manifest.files[entry.weights].size_bytes for entry in manifest.experts) / len(manifest.experts)
    floor_ms = expert_bytes / rate / 1e6
    points: list[dict[str, Any]] = []
    for tokens in counts:
        rows = rng.standard_normal((tokens, manifest.model.d_model), np.float32)

        def call(number: int, rows: Any = rows) -> None:
            entry = manifest.experts[number % len(manifest.experts)]
            engine.run(entry.block, entry.expert, rows)

        p50_ms, p95_ms = np.percentile(times_ms(call), (50, 95))
        points.append(
            {"tokens": tokens, "p50_ms": p50_ms, "p95_ms": p95_ms, "time_over_floor": float(p50_ms) / floor_ms}
        )
    return {
        "max_error": worst,
        "tolerance": engine.tolerance,
        "expert_bytes": expert_bytes,
        "floor_ms": floor_ms,
        "points": points,
    }


def memory_gb_per_s(torch_device: str) -> float:
    """Measure how fast the memory of the GPU is read and written: bytes of both, by ONNX Runtime itself."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    n = _COPIED if torch_device == "cuda" else _COPIED >> 5
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [n]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negate", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[torch_device]
    session = ort.InferenceSession(model.SerializeToString(), providers=[provider])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(np.ones(n, np.float16), torch_device, 0))
    out = ort.OrtValue.ortvalue_from_shape_and_type([n], np.float16, torch_device, 0)
    binding.bind_ortvalue_output("y", out)
    return float(2 * 2 * n / np.median(times_ms(lambda _: session.run_with_iobinding(binding))) / 1e6)


def times_ms(call: Callable[[int], object]) -> list[float]:
    """Time calls, after a few that are not timed."""
    times: list[float] = []
    for number in range(_UNTIMED_CALLS + _CALLS):
        started_s = time.perf_counter()
        call(number)
        times.append((time.perf_counter() - started_s) * 1e3)
    return times[_UNTIMED_CALLS:]


def describe(found: dict[str, Any]) -> str:
    """Put a measurement on one line."""
    times = ", ".join(f"{p['tokens']}: {p['p50_ms']:.3f} ({p['time_over_floor']:.2f} x)" for p in found["points"])
    return (
        f"largest error {found['max_error']:.1e} (allowed {found['tolerance']:.0e}); ms by tokens, over floor: {times}"
    )


if __name__ == "__main__":
    main()
