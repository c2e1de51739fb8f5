"""How long deciding takes: every policy under every division of the band, for one token and for 4,096.

    python scripts/bench/scheduler.py --json -

A decision is what a run's pipeline does, `wdmoe.bs.deciding.context_of` and `choose`, from what trackers know of the devices and
the router's logits; and `decide` beyond it: loads, shares or order, the predicted block time. 8 experts on 8 unequal devices,
top-2. Each time is the median over many decisions on different routings, in rounds over all policies for a minute or two, of which
the quickest counts: what else is at work on a machine comes and goes, and only ever adds. The figures are those of the slowest
policy: `decide_us_1` <= 50, `decide_ms_4096x8x8` <= 2; and, unless it is left out, `simulate_1000x32x1000_s` <= 1 of
scripts/bench/simulator.py. It runs on one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT)]
from scripts.bench._environment import CpuUse, environment, progress, write_json
from scripts.bench.simulator import SENSITIVITY, simulation_s
from wdmoe.bs.airtime import Medium
from wdmoe.bs.deciding import asks_replicas, context_of, decide, model_of
from wdmoe.bs.latency import DeviceLatency
from wdmoe.bs.policies import Policy, parse_policy
from wdmoe.bs.routing import Floats, Routing, route
from wdmoe.profiles.modelled import ExpertShape, hardware_names, modelled_profile

BARS = {"decide_us_1": 50.0, "decide_ms_4096x8x8": 2.0, "simulate_1000x32x1000_s": 1.0}
N_EXPERTS = N_DEVICES = 8
TOP_K = 2
DIVISIONS: dict[str, Medium] = {"uniform": "own", "shared": "shared", "per-block": "pooled"}
OWNER = np.arange(N_EXPERTS)
HOLDERS = np.eye(N_EXPERTS, N_DEVICES, dtype=np.bool_) | np.eye(N_EXPERTS, N_DEVICES, 1, dtype=np.bool_)
NORMS = np.linspace(0.5, 2.0, N_EXPERTS, dtype=np.float32)
# Options under which a policy has work to do; for one token a budget that can be spent at all.
POLICIES = (
    "exact",
    "round-robin",
    "wlr",
    "ser",
    "top-cut",
    "top-cut:pairs=true",
    "capacity",
    "capacity:overflow=next",
    "wlr:rounds=2",
    "bottleneck",
    "bottleneck:budget=0.4",
    "bottleneck:budget=0.4,protect=false",
    "wlr:loss=0.01",
    "top-cut:pairs=true,loss=0.01",
    "capacity:loss=0.01",
    "bottleneck:loss=0.01,renormalise=false",
)
_ROUTINGS = 16
_WARM_UP = 3
_ROUNDS = 16
Blocks = Sequence[tuple[Routing, Floats]]
_USUAL_FLOATS = 1 << 20  # of a run's larger arrays


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Each routing is decided ten times as often for one token, a quarter as often for 4,096.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--simulation/--no-simulation", default=True, show_default=True, help="Time the simulator as well.")
def main(target: str | None, repeats: int, seed: int, simulation: bool) -> None:
    """Time decisions; exit code 1 if a bar is missed."""
    use = CpuUse()
    np.ones(_USUAL_FLOATS)  # as in any run: the allocator learns to keep what is freed, instead of asking for it anew
    one, many = measure((1, 4096), (2 * repeats, max(1, repeats // 20)), seed)
    figures = {"decide_us_1": max(one.values()) * 1e6, "decide_ms_4096x8x8": max(many.values()) * 1e3}
    simulated = simulation_s(POLICIES, repeats=2) if simulation else {}
    if simulated:
        figures["simulate_1000x32x1000_s"] = max(simulated.values())
    reached = {name: figures[name] <= BARS[name] for name in figures}
    result: dict[str, Any] = {
        **figures,
        "bars": BARS,
        "reached": reached,
        "passed": all(reached.values()),
        "us_1": {name: s * 1e6 for name, s in one.items()},
        "ms_4096x8x8": {name: s * 1e3 for name, s in many.items()},
        "simulate_s": simulated,
        **use.since(),
        **environment(("numpy",)),
    }
    for name, value in figures.items():
        progress(f"{name} {value:.3g}, bar {BARS[name]:g}")
    if target is not None:
        write_json(target, result)
    sys.exit(not result["passed"])


def measure(tokens: Sequence[int], repeats: Sequence[int], seed: int) -> list[dict[str, float]]:
    """Return the seconds of a decision by policy and division, for each number of tokens; rounds of them take turns."""
    rng = np.random.default_rng(seed)
    names, shape = hardware_names(), ExpertShape(4096, 14336)
    curves = [modelled_profile(names[k % len(names)], "int4", shape).curve() for k in range(N_DEVICES)]
    air_ms = 1.3 / rng.uniform(1, 6, N_DEVICES)
    devices = [
        DeviceLatency(curve, 2.0, float(rng.uniform(0.8, 1.5)), float(row_ms))
        for curve, row_ms in zip(curves, air_ms, strict=True)
    ]
    found: list[tuple[dict[str, float], int, Blocks]] = [
        ({}, n, [ask(rng, count) for _ in range(_ROUTINGS)]) for count, n in zip(tokens, repeats, strict=True)
    ]
    for _ in range(_ROUNDS):
        for times, n, blocks in found:
            time_all(times, n, blocks, devices)
    for count, (times, _, _) in zip(tokens, found, strict=True):
        for name, s in sorted(times.items(), key=lambda item: -item[1])[:5]:
            progress(f"{count} tokens, {name}: {s * 1e6:.0f} us")
    return [times for times, _, _ in found]


def time_all(times: dict[str, float], repeats: int, blocks: Blocks, devices: Sequence[DeviceLatency]) -> None:
    """Time all policies under all divisions once, and keep what is quicker than what is known."""
    for text, (division, medium) in product(POLICIES, DIVISIONS.items()):
        policy = parse_policy(text)
        for routing, logits in blocks[:_WARM_UP]:
            timed(policy, routing, logits, devices, medium)
        taken = median([timed(policy, *block, devices, medium) for _ in range(repeats) for block in blocks])
        name = f"{text} {division}"
        times[name] = min(taken, times.get(name, taken))


def ask(rng: np.random.Generator, tokens: int) -> tuple[Routing, Floats]:
    """Draw the logits of a block's router."""
    logits = 1.5 * rng.standard_normal((tokens, N_EXPERTS)).astype(np.float32)
    return route(logits, TOP_K, normalise=True), logits


def timed(policy: Policy, routing: Routing, logits: Floats, devices: Sequence[DeviceLatency], medium: Medium) -> float:
    """Return the seconds of one decision."""
    known = {"weight": SENSITIVITY}
    holders = HOLDERS if asks_replicas(policy) else None
    started_s = time.perf_counter()
    context = context_of(policy, 0, routing, logits, devices, medium, norms=NORMS, holders=holders, sensitivity=known)
    model = context.model or model_of(devices, len(routing.experts), medium)
    decide(routing, OWNER, policy, context, model)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
