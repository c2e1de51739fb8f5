"""How long does simulating 1,000 devices x 32 blocks x 1,000 tokens take? The worst of the given policies and media.

    python scripts/bench/simulator.py --json -

One question of 1,000 tokens through 32 blocks of 128 experts, 8 for each token, on 1,000 modelled devices in a fading cell;
each expert has 7 or 8 holders. The bar: `simulate_1000x32x1000_s` <= 1, from the probabilities to the latency.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT)]
from scripts.bench._environment import environment, progress, write_json
from wdmoe.bs.airtime import latency_model
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.policies import Sensitivity, parse_policy
from wdmoe.bs.radio import Cell, RadioConfig
from wdmoe.bs.simulation import Bandwidth, Site, simulate, spread
from wdmoe.bs.trace import Trace, TraceInfo
from wdmoe.profiles.modelled import ExpertShape, hardware_names, modelled_profile

BAR_S = 1.0
SENSITIVITY = Sensitivity(0.02, 0.03)  # of a block: about what the small model's mind
DEVICES, BLOCKS, TOKENS, EXPERTS, TOP_K = 1000, 32, 1000, 128, 8
MEDIA: tuple[Bandwidth, ...] = ("shared", "uniform", "per-block")


def invented_trace(blocks: int, tokens: int, experts: int, top_k: int, seed: int = 0) -> Trace:
    """Draw router probabilities of one question, about as uneven as those of trained routers."""
    rng = np.random.default_rng(seed)
    odds = rng.gamma(0.3, size=(blocks, tokens, experts))
    probabilities = (odds / odds.sum(axis=2, keepdims=True)).astype(np.float16)
    info = TraceInfo(
        "wdmoe-trace",
        1,
        "bench",
        "invented",
        "0" * 64,
        top_k,
        True,
        {"invented": 1},
        {},
        {"weight": (SENSITIVITY,) * blocks},
    )
    nothing = np.zeros((blocks, experts), np.int64)
    return Trace(info, probabilities, np.array([0, tokens]), nothing, nothing)


def simulation_s(
    policies: Sequence[str],
    media: Sequence[Bandwidth] = MEDIA,
    devices: int = DEVICES,
    blocks: int = BLOCKS,
    tokens: int = TOKENS,
    repeats: int = 3,
) -> dict[str, float]:
    """Return the best of some times, in seconds, of each policy on each medium."""
    trace = invented_trace(blocks, tokens, EXPERTS, TOP_K)
    hardware = [hardware_names()[k % len(hardware_names())] for k in range(devices)]
    curves = {name: modelled_profile(name, "int4", ExpertShape(4096, 1536)).curve() for name in hardware_names()}
    model = latency_model([DeviceLatency(curves[name], 2.0) for name in hardware], tokens)
    holders = spread(blocks, EXPERTS, devices)
    times: dict[str, float] = {}
    for text in policies:
        for medium in media:
            taken: list[float] = []
            for _ in range(repeats):
                site = Site(model, holders, medium, cell=Cell(RadioConfig(), devices, 0))
                started_s = time.perf_counter()
                simulate(trace, site, parse_policy(text))
                taken.append(time.perf_counter() - started_s)
            times[f"{text}, {medium}"] = min(taken)
    return times


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--policy", "policies", multiple=True, default=("exact", "wlr"), show_default=True)
@click.option("--devices", type=int, default=DEVICES, show_default=True)
@click.option("--blocks", type=int, default=BLOCKS, show_default=True)
@click.option("--tokens", type=int, default=TOKENS, show_default=True)
def main(target: str | None, policies: Sequence[str], devices: int, blocks: int, tokens: int) -> None:
    """Time the simulator; exit code 1 if the worst takes longer than the bar."""
    times = simulation_s(policies, devices=devices, blocks=blocks, tokens=tokens)
    worst = max(times, key=lambda name: times[name])
    for name, seconds in times.items():
        progress(f"{name}: {seconds:.3f} s")
    whole = (devices, blocks, tokens) == (DEVICES, BLOCKS, TOKENS)
    result: dict[str, Any] = {
        "simulate_1000x32x1000_s" if whole else "simulate_s": times[worst],
        "worst": worst,
        "bar": BAR_S,
        "passed": times[worst] <= BAR_S,
        "seconds": times,
        "devices": devices,
        "blocks": blocks,
        "tokens": tokens,
        **environment(("numpy",)),
    }
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
