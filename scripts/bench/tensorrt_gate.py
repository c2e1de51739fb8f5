"""Builds the networks of our experts with TensorRT-RTX, which needs no GPU for that, and looks at plan size and scratch.

    python -m pip install -e '.[tensorrt-gate]'
    python scripts/bench/tensorrt_gate.py --json -
    python scripts/bench/tensorrt_gate.py --shape 576x256 --precision fp16 --json -

The builder code is the one that a Jetson runs (`wdmoe.runtime.engines.tensorrt_network`); the builder is not: TensorRT's own
libraries cannot be had without a Jetson, and TensorRT-RTX targets no Orin. Bars: every network is accepted; scratch beyond the
activations and the kernels' reserve is at most 1/8 of the expert's weights in float16 (more means that weights are copied or
dequantised to memory); the fp16 plan, one for all experts, is under 1 MB. Exit code 1 if a bar is missed.

The reserve is what the kernels set aside whatever the shape, found from two experts of small weights (2048 x 128 and 2048 x 256)
in the same precision: what is left when the weights shrink to nothing. `strict` is the ratio without taking it off.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT)]
from scripts.bench._environment import environment, progress, write_json
from wdmoe.device.cli_tools import read_shape
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.engines.tensorrt_network import (
    SCRATCH_LIMIT,
    TOKEN_RANGES,
    Array,
    BuildOptions,
    Built,
    ExpertNetwork,
    Precision,
    Scratch,
    build_plan,
    references,
    reserve_bytes,
)
from wdmoe.runtime.errors import EngineError

SHAPES = {
    "Mixtral-8x7B": ExpertShape(4096, 14336),
    "OLMoE": ExpertShape(2048, 1024),
    "Qwen3-MoE": ExpertShape(2048, 768),
    "smollm2-moe": ExpertShape(576, 256),
}
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "int4")
PLAN_LIMIT_BYTES = 1_000_000  # of the fp16 plan


def constants_of(network: ExpertNetwork) -> dict[str, Array] | None:
    """Draw weights where they are part of the plan."""
    if network.precision != "int4":
        return None
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256, shape, np.uint8)
        if dtype == np.uint8
        else rng.uniform(0.001, 0.01, shape).astype(np.float16)
        for name, (dtype, shape) in network.weight_tensors().items()
    }


def built(trt: Any, network: ExpertNetwork, options: BuildOptions) -> Built:
    """Build one network.

    Raises:
        EngineError: it is refused, or the builder does not tell its scratch.
    """
    made = build_plan(trt, network, constants_of(network), options=options)
    if len(made.scratch_bytes) != len(TOKEN_RANGES):
        raise EngineError(f"the builder tells the scratch of {len(made.scratch_bytes)} of {len(TOKEN_RANGES)} ranges")
    return made


def measured(trt: Any, network: ExpertNetwork, options: BuildOptions) -> dict[str, Any]:
    """Build a network and its reference, and compare."""
    started_s = time.perf_counter()
    try:
        made = built(trt, network, options)
        sizes = [built(trt, reference, options).scratch_bytes for reference in references(network.precision)]
    except EngineError as error:
        return {"accepted": False, "error": str(error), "passed": False}
    reserve = reserve_bytes(network.precision, *sizes)
    ranges = []
    for index, tokens in enumerate(TOKEN_RANGES):
        bare = Scratch(made.scratch_bytes[index], network.activation_bytes(tokens.most), network.fp16_weight_bytes)
        scratch = replace(bare, reserve_bytes=reserve[index])
        ranges.append(
            {
                "tokens": tokens.most,
                **asdict(scratch),
                "scratch_over_weights": scratch.over_weights,
                "strict": bare.over_weights,
            }
        )
    worst = max(found["scratch_over_weights"] for found in ranges)
    small = network.precision != "fp16" or len(made.plan) < PLAN_LIMIT_BYTES
    return {
        "accepted": True,
        "plan_bytes": len(made.plan),
        "ranges": ranges,
        "scratch_over_weights": worst,
        "strict": max(found["strict"] for found in ranges),
        "wall_s": time.perf_counter() - started_s,
        "passed": worst <= SCRATCH_LIMIT and small,
    }


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", multiple=True, callback=lambda c, p, v: [read_shape(c, p, text) for text in v],
              metavar="DxF", help="Only experts of this shape.  [default: those of four models]")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=PRECISIONS)
@click.option("--compute-capability", default="SM86", help="Of the GPU to build for; the one nearest to Orin is there.")
@click.option("--json", "target", metavar="FILE", help="Write the result as JSON; - for stdout.")
def main(
    shapes: list[ExpertShape], precisions: tuple[Precision, ...], compute_capability: str, target: str | None
) -> None:
    """Build our experts with TensorRT-RTX and check plan size and scratch."""
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise click.ClickException(f"{error}: python -m pip install -e '.[tensorrt-gate]'") from error
    named = {f"{shape.d_model}x{shape.d_ff}": shape for shape in shapes} or SHAPES
    # A bounded workspace is tried out on the device, which is not there.
    options = BuildOptions(workspace_bytes=None, compute_capability=compute_capability)
    rows: dict[str, dict[str, Any]] = {}
    for name, shape in named.items():
        for precision in precisions:
            row = measured(trt, ExpertNetwork(shape.d_model, shape.d_ff, precision), options)
            rows[f"{name} {precision}"] = {"d_model": shape.d_model, "d_ff": shape.d_ff, "precision": precision, **row}
            if row["accepted"]:
                progress(
                    f"{name} {precision}: plan {row['plan_bytes'] / 1e6:.3f} MB, scratch over weights "
                    f"{row['scratch_over_weights']:.4f} (strict {row['strict']:.3f}), {row['wall_s']:.1f} s"
                )
            else:
                progress(f"{name} {precision}: {row['error']}")
    accepted = [row for row in rows.values() if row["accepted"]]
    worst = max((row["scratch_over_weights"] for row in accepted), default=None)
    passed = all(row["passed"] for row in rows.values())
    progress(f"worst {worst}, bar {SCRATCH_LIMIT}: {'passed' if passed else 'missed'}")
    if target is not None:
        result = {
            "scratch_over_weights": worst,
            "bar": SCRATCH_LIMIT,
            "strict": max((row["strict"] for row in accepted), default=None),
            "passed": passed,
            "builder": f"TensorRT-RTX {trt.__version__} for {compute_capability}, no GPU",
            "networks": rows,
            **environment(("numpy", "tensorrt-rtx-cu13")),
        }
        write_json(target, result)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
