"""Does anything grow, does anything get lost? One base station and four devices at work without a pause, on loopback.

    python scripts/bench/soak.py --minutes 60 --json -

The bundled PIQA sample is answered over and over under policy exact. Resident memory of the base station (this
process) and of each device process is sampled every few seconds. Level means: a straight line through the samples of
the second half rises by at most 1 % of their mean or 2 MiB, whichever is more. The bars: every process is level, every
question is answered with the numbers of the first round, nothing was replaced, hedged, refused or late
(`lost_requests` 0).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import exit_on_sigterm, free_address

from scripts.bench._environment import environment, progress, write_json
from scripts.bench._system import MODELS, exported, piqa_questions, rss_mib, running_devices, wait_for_names
from wdmoe.bs.config import StationConfig
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Answer
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import open_station
from wdmoe.runtime.errors import WdmoeError

LEVEL_SHARE, LEVEL_MIB = 0.01, 2.0
TOLERANCE = 1e-3
BS = "bs"
QUESTIONS = 16  # of a round


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True)
@click.option("--model", type=click.Choice(MODELS), help="By default the small real one if it can be had, else tiny.")
@click.option("--sample", "sample_s", type=float, default=5.0, show_default=True, help="Seconds between samples.")
def main(target: str | None, minutes: float, model: str | None, sample_s: float) -> None:
    """Work without a pause; exit code 1 if memory grows or a request is lost."""
    exit_on_sigterm()
    address = free_address()
    samples: dict[str, list[tuple[float, float]]] = {}
    asked = answered = wrong = rounds = 0
    error = None
    with exported(model) as (name, bundle), running_devices(bundle, address) as devices:
        config = StationConfig(bundle=bundle, listen=address, wire="fp32")
        with open_station(config, progress) as station:
            wait_for_names(station, list(devices.by_name))
            questions = piqa_questions(station)
            window = station.manifest.model.sliding_window
            first: dict[str, Answer] = {}
            started_s = time.monotonic()
            next_sample_s = 0.0

            def take_sample() -> None:
                nonlocal next_sample_s
                elapsed_s = time.monotonic() - started_s
                if elapsed_s < next_sample_s:
                    return
                next_sample_s = elapsed_s + sample_s
                for who, pid in [(BS, os.getpid()), *((d.name, d.pid) for d in devices.by_name.values())]:
                    samples.setdefault(who, []).append((elapsed_s, rss_mib(pid)))

            try:
                while time.monotonic() - started_s < 60 * minutes:
                    start = rounds * QUESTIONS % len(questions)
                    part = questions[start : start + QUESTIONS]
                    asked += len(part)
                    scorer = DistributedScorer(station.pipeline, Exact(), config.in_flight, window)
                    answers = scorer.score(part, lambda *_: take_sample())
                    answered += len(answers)
                    for question, answer in zip(part, answers, strict=True):
                        wrong += not same(answer, first.setdefault(question.name, answer))
                    rounds += 1
                    if rounds % 50 == 0:
                        latest = ", ".join(f"{who} {values[-1][1]:.1f}" for who, values in samples.items())
                        progress(f"{(time.monotonic() - started_s) / 60:.1f} min, {answered} answers, MiB: {latest}")
            except (WdmoeError, ProcessLookupError, FileNotFoundError) as caught:
                error = str(caught)
            wall_s = time.monotonic() - started_s
            requests = station.pipeline.requests
            troubles = {key: requests.counts[key] for key in ("replaced", "hedged", "skipped")}
            troubles |= {"late_replies": requests.late_replies}
            troubles |= {"refused": sum(station.hub.refused.counts.values())}
            restarts = sum(device.starts - 1 for device in devices.by_name.values())
    lost = asked - answered + sum(troubles.values()) + restarts
    memory = {who: describe(values) for who, values in samples.items()}
    missed = [f"{who} grows" for who, values in memory.items() if not values["level"]]
    missed += [f"lost_requests {lost}"] * (lost > 0) + [f"wrong_answers {wrong}"] * (wrong > 0)
    missed += [error] if error is not None else []
    result: dict[str, Any] = {
        "model": name,
        "minutes": wall_s / 60,
        "level": all(values["level"] for values in memory.values()),
        "lost_requests": lost,
        "wrong_answers": wrong,
        "answers": answered,
        "answers_per_s": answered / wall_s,
        "error": error,
        **troubles,
        "bars": {"level_share": LEVEL_SHARE, "level_mib": LEVEL_MIB, "lost_requests": 0, "wrong_answers": 0},
        "passed": not missed,
        "memory": memory,
        "samples_mib": {who: [[round(t, 1), round(mib, 2)] for t, mib in values] for who, values in samples.items()},
        **environment(("numpy", "onnxruntime", "pyzmq")),
    }
    progress(f"missed: {', '.join(missed)}" if missed else f"level, {answered} answers, none lost")
    if target is not None:
        write_json(target, result)
    sys.exit(1 if missed else 0)


def same(ours: Answer, theirs: Answer) -> bool:
    """Whether a later round says what the first one said."""
    pairs = zip(ours.log_likelihoods, theirs.log_likelihoods, strict=True)
    return all(abs(a - b) <= TOLERANCE for a, b in pairs)


def describe(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Fit a line to the second half of (seconds, MiB)."""
    half = np.array(samples[len(samples) // 2 :])
    span_s = float(half[-1, 0] - half[0, 0])
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) if len(half) > 2 and span_s else 0.0
    mean_mib, rise_mib = float(half[:, 1].mean()), slope * span_s
    return {
        "first_mib": samples[0][1],
        "mean_mib": mean_mib,
        "last_mib": samples[-1][1],
        "rise_mib": rise_mib,  # of the line, over the second half
        "slope_mib_per_hour": slope * 3600,
        "level": len(half) > 2 and rise_mib <= max(LEVEL_MIB, LEVEL_SHARE * mean_mib),
    }


if __name__ == "__main__":
    main()
