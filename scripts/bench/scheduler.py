"""How long deciding takes: every policy under every division of the band, for one token and for 4,096.

    python scripts/bench/scheduler.py --json -

A decision is `wdmoe.bs.deciding.decide`: selection, loads, shares or order, the predicted block time; from plain values,
8 experts on 8 unequal devices, top-2. Each time is the median over many decisions on different routings. The figures are
those of the slowest policy: `decide_us_1` <= 50, `decide_ms_4096x8x8` <= 2; and, unless it is left out,
`simulate_1000x32x1000_s` <= 1 of scripts/bench/simulator.py. It runs on one thread.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from devices import random_model

from scripts.bench._environment import CpuUse, environment, progress, write_json
from scripts.bench.simulator import SENSITIVITY, simulation_s
from wdmoe.bs.allocation import Radio
from wdmoe.bs.deciding import Division, decide, make_band
from wdmoe.bs.policies import Context, parse_policy
from wdmoe.bs.routing import Routing, route

BARS = {"decide_us_1": 50.0, "decide_ms_4096x8x8": 2.0, "simulate_1000x32x1000_s": 1.0}
N_EXPERTS = N_DEVICES = 8
TOP_K = 2
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


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Decisions on each routing.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--simulation/--no-simulation", default=True, show_default=True, help="Time the simulator as well.")
def main(target: str | None, repeats: int, seed: int, simulation: bool) -> None:
    """Time decisions; exit code 1 if a bar is missed."""
    use = CpuUse()
    one = measure(1, 10 * repeats, seed)
    many = measure(4096, max(1, repeats // 4), seed)
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


def measure(tokens: int, repeats: int, seed: int) -> dict[str, float]:
    """Return the median seconds of a decision, by policy and division."""
    rng = np.random.default_rng(seed)
    devices = random_model(rng, N_DEVICES, "own", up_to=tokens)
    quality = rng.uniform(1, 6, N_DEVICES)
    radio = Radio(100e6, 65_536.0, quality, quality)
    band = make_band(devices, radio)
    questions = [ask(rng, tokens) for _ in range(_ROUTINGS)]
    owner = np.arange(N_EXPERTS)
    times: dict[str, float] = {}
    for text in POLICIES:
        policy = parse_policy(text)
        for division in get_args(Division):
            for routing, context in questions[:_WARM_UP]:
                decide(routing, owner, policy, band, division, context)
            taken = [
                timed(routing, owner, policy, band, division, context)
                for _ in range(repeats)
                for routing, context in questions
            ]
            times[f"{text} {division}"] = median(taken)
    for name, s in sorted(times.items(), key=lambda item: -item[1])[:5]:
        progress(f"{tokens} tokens, {name}: {s * 1e6:.0f} us")
    return times


def ask(rng: np.random.Generator, tokens: int) -> tuple[Routing, Context]:
    """Draw the gates of a block."""
    logits = 1.5 * rng.standard_normal((tokens, N_EXPERTS)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    holders = np.eye(N_EXPERTS, N_DEVICES, dtype=np.bool_) | np.eye(N_EXPERTS, N_DEVICES, 1, dtype=np.bool_)
    norms = rng.uniform(0.5, 2.0, N_EXPERTS).astype(np.float32)
    context = Context(holders=holders, probabilities=probabilities, norms=norms, sensitivity={"weight": SENSITIVITY})
    return route(logits, TOP_K, normalise=True), context


def timed(*decision: Any) -> float:
    """Return the seconds of one decision."""
    started_s = time.perf_counter()
    decide(*decision)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
