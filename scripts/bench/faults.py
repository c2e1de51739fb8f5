"""What happens to a PIQA run when a device is killed (SIGKILL) or frozen (SIGSTOP) at a random moment; real processes.

    python scripts/bench/faults.py --json -

Four devices, policy exact, `--wire fp32`, three set-ups: a second process for each device folder (`replica`), the base
station's own copy (`bs-holds`), and nothing to fall back on (`none`). In each, N moments of SIGKILL and N of SIGSTOP.

With a replacement, one base station lives through all moments. Each moment is a run over the first questions of
piqa-sample; the device that the base station would ask is hit after a random question plus a random part of a
question's time. The bars: every run ends and no log-likelihood differs by more than 1e-3 from an undisturbed run, nor
any choice (`wrong_answers`, `hangs`, `failed_runs` 0). The stall is the longest gap between two answers less the
median gap of an undisturbed run, over the 2 s that a silent device is allowed: its 99th percentile must be at most 2.
Between moments the victim is started again, or let go on; at the end all must have been re-admitted.

Without a replacement, each moment is a `wdmoe-bs run` of its own (forked from a process that has imported lm-eval, to
save its start). The bars: exit code 1, the victim's name in the error on stderr, within twice the time allowed, which
the error tells. A run that was over before it needed the victim is counted in `too_late` and repeated.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import exit_on_sigterm, free_address

from scripts.bench._environment import environment, progress, write_json
from scripts.bench._system import MODELS, N_DEVICES, Devices, exported, piqa_questions, running_devices, wait_for_names
from wdmoe.bs.config import StationConfig
from wdmoe.bs.fleet import BS_HOLDS
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Answer, Question
from wdmoe.bs.requests import LATE_AT_LEAST_S
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.station import Station, open_station
from wdmoe.runtime.errors import WdmoeError

TOLERANCE = 1e-3  # of a log-likelihood, between a disturbed and an undisturbed run
MAX_STALL = 2.0  # times what is allowed
HANG_S = 30.0  # beyond an undisturbed run
SIGNALS = ("SIGKILL", "SIGSTOP")
SETUPS = ("replica", "bs-holds", "none")
_REFUSED_RESTART = "another device of that name is connected"

Moment = dict[str, Any]


class Hang(Exception):
    """A run has not ended when it should long have."""


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--moments", type=click.IntRange(min=1), default=40, show_default=True, help="Of each signal and set-up.")
@click.option("--model", type=click.Choice(MODELS), help="By default the small real one if it can be had, else tiny.")
@click.option("--questions", type=click.IntRange(min=3), default=8, show_default=True, help="Of each disturbed run.")
@click.option("--setup", "setups", type=click.Choice(SETUPS), multiple=True, default=SETUPS, help="Only these.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(target: str | None, moments: int, model: str | None, questions: int, setups: Sequence[str], seed: int) -> None:
    """Break devices while they are needed; exit code 1 if a bar is missed."""
    exit_on_sigterm()
    started = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    with exported(model) as (name, bundle):
        for number, setup in enumerate(setups):
            rng = np.random.default_rng([seed, number])
            plan = [signal_name for signal_name in SIGNALS for _ in range(moments)]
            rng.shuffle(plan)
            progress(f"{setup}: {len(plan)} moments")
            if setup == "none":
                results[setup] = without_replacement(bundle, plan, rng)
            else:
                results[setup] = with_replacement(bundle, setup, plan, questions, rng)
    stalls = [m["stall_over_deadline"] for r in results.values() for m in r["moments"] if "stall_over_deadline" in m]
    counted = ("wrong_answers", "hangs", "failed_runs", "not_readmitted", "unnamed_ends")
    totals: dict[str, Any] = {key: sum(result.get(key, 0) for result in results.values()) for key in counted}
    totals["p99_stall_over_deadline"] = percentile99(stalls)
    bars = dict.fromkeys(counted, 0) | {"p99_stall_over_deadline": MAX_STALL}
    missed = [f"{key} {totals[key]:g}" for key, bar in bars.items() if not totals[key] <= bar]
    result = {
        "model": name,
        **totals,
        "bars": bars,
        "passed": not missed,
        "moments_of_each_signal": moments,
        "questions": questions,
        "allowed_s": LATE_AT_LEAST_S,
        "tolerance": TOLERANCE,
        "policy": "exact",
        "wire": "fp32",
        "seed": seed,
        "wall_s": time.monotonic() - started,
        "setups": results,
        **environment(("numpy", "onnxruntime", "pyzmq", "lm-eval")),
    }
    progress(f"missed: {', '.join(missed)}" if missed else f"all bars are met: {json.dumps(totals)}")
    if target is not None:
        write_json(target, result)
    sys.exit(1 if missed else 0)


# -- somebody takes over -----------------------------------------------------------------------------------------------


def with_replacement(
    bundle: Path, setup: str, plan: Sequence[str], count: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Hit a device in each of many runs of one base station."""
    address = free_address()
    holds = "all" if setup == "bs-holds" else "none"
    config = StationConfig(bundle=bundle, listen=address, wire="fp32", bs_holds=holds)
    moments: list[Moment] = []
    with (
        running_devices(bundle, address, replicas=setup == "replica") as devices,
        open_station(config, lambda text: progress(f"{setup}: {text}")) as station,
    ):
        wait_for_names(station, list(devices.by_name))
        questions = piqa_questions(station, count)
        undisturbed(station, questions)  # the first calls allocate
        expected, gaps = undisturbed(station, questions)
        median_s = statistics.median(gaps)
        progress(f"{setup}: {sum(gaps):.2f} s for {count} questions undisturbed")
        back_since: dict[str, float] = {}  # victim -> when it could first have come back
        readmitted_s: list[float] = []
        for number, signal_name in enumerate(plan):
            victim = await_victim(station, devices, rng, back_since, readmitted_s)
            moment = disturbed(station, devices, questions, expected, median_s, sum(gaps), victim, signal_name, rng)
            devices.thaw()
            back_since[victim] = time.monotonic()
            devices.keep()
            moments.append(moment)
            progress(f"{setup} {number + 1}/{len(plan)}: {json.dumps(moment)}")
            if moment["outcome"] == "hang":
                break  # what the base station does now proves nothing
        not_readmitted = 0
        deadline_s = time.monotonic() + HANG_S
        while back_since and time.monotonic() < deadline_s:
            settle(station, devices, back_since, readmitted_s)
        not_readmitted = len(back_since)
        restarts_refused = devices.said(_REFUSED_RESTART)
    outcomes = [moment["outcome"] for moment in moments]
    return {
        "wrong_answers": sum(moment.get("wrong_answers", 0) for moment in moments),
        "hangs": outcomes.count("hang"),
        "failed_runs": outcomes.count("failed"),
        "not_readmitted": not_readmitted,
        "p99_stall_over_deadline": percentile99([m["stall_over_deadline"] for m in moments if "stall_s" in m]),
        "longest_stall_s": max((m["stall_s"] for m in moments if "stall_s" in m), default=None),
        "largest_difference": max((m["largest_difference"] for m in moments if "stall_s" in m), default=None),
        "undisturbed_s": sum(gaps),
        "undisturbed_median_gap_s": median_s,
        "readmitted_after_s": readmitted_s,
        "restarts_refused": restarts_refused,  # too soon after a crash: its name still counts as connected
        "replaced": station.pipeline.requests.counts["replaced"],
        "hedged": station.pipeline.requests.counts["hedged"],
        "moments": moments,
    }


def undisturbed(station: Station, questions: Sequence[Question]) -> tuple[list[Answer], list[float]]:
    """Answer the questions; return the answers, and the time from each to the next."""
    times = [time.monotonic()]
    scorer = DistributedScorer(station.pipeline, Exact(), station.config.in_flight, window(station))
    answers = scorer.score(questions, lambda *_: times.append(time.monotonic()))
    return answers, np.diff(times).tolist()


def await_victim(
    station: Station,
    devices: Devices,
    rng: np.random.Generator,
    back_since: dict[str, float],
    readmitted_s: list[float],
) -> str:
    """Choose a device folder, and of those that serve it the one that would be asked; wait if none of them is back."""
    deadline_s = time.monotonic() + HANG_S
    while True:
        settle(station, devices, back_since, readmitted_s)
        choice: list[str] = []
        for folder in range(N_DEVICES):
            serving = [name for name in devices.by_name if name.endswith(f"-{folder}")]
            block, expert = next(
                (b, e) for b, row in enumerate(station.manifest.placement) for e, k in enumerate(row) if folder in k
            )
            asked = station.pipeline.requests.preferred(block, expert)
            replaceable = station.config.bs_holds == "all" or not any(name in back_since for name in serving)
            if asked is not None and asked != BS_HOLDS and asked not in back_since and replaceable:
                choice.append(asked)
        if choice:
            return str(rng.choice(choice))
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no device came back in {HANG_S:g} s: {', '.join(back_since)}")


def settle(station: Station, devices: Devices, back_since: dict[str, float], readmitted_s: list[float]) -> None:
    """Turn the loop once, start what has ended, and note who is back."""
    devices.keep()
    station.pipeline.idle(0.05)
    fleet, now_s = station.pipeline.requests.fleet, time.perf_counter()
    for name, since_s in list(back_since.items()):
        device = station.hub.devices.get(name)
        heard = device is not None and device.last_heard_s > now_s - (time.monotonic() - since_s)
        if heard and fleet.usable(name):
            readmitted_s.append(time.monotonic() - back_since.pop(name))


def disturbed(
    station: Station,
    devices: Devices,
    questions: Sequence[Question],
    expected: Sequence[Answer],
    median_s: float,
    usual_s: float,
    victim: str,
    signal_name: str,
    rng: np.random.Generator,
) -> Moment:
    """Answer the questions while a device is hit."""
    after, delay_s = int(rng.integers(0, len(questions) - 1)), float(rng.uniform(0, median_s))
    moment: Moment = {"signal": signal_name, "victim": victim, "after_questions": after, "delay_ms": 1e3 * delay_s}
    latency = station.hub.devices[victim].latency
    moment |= {"correction": latency.model().correction, "tail_ratio": latency.profile.tail_ratio}
    hit = devices.by_name[victim].kill if signal_name == "SIGKILL" else devices.by_name[victim].freeze
    timer = threading.Timer(delay_s, hit)
    times = [time.monotonic()]

    def on_answer(number: int, answer: Answer) -> None:
        times.append(time.monotonic())
        if len(times) - 1 == after:
            timer.start()

    if after == 0:
        timer.start()
    scorer = DistributedScorer(station.pipeline, Exact(), station.config.in_flight, window(station))
    try:
        with alarm(usual_s + HANG_S):
            answers = scorer.score(questions, on_answer)
    except Hang:
        return moment | {"outcome": "hang"}
    except WdmoeError as error:
        return moment | {"outcome": "failed", "error": str(error)}
    finally:
        if timer.ident is not None:
            timer.join()
    differences = [
        abs(ours - theirs)
        for answer, reference in zip(answers, expected, strict=True)
        for ours, theirs in zip(answer.log_likelihoods, reference.log_likelihoods, strict=True)
    ]
    stall_s = max(0.0, max(np.diff(times)) - median_s)
    return moment | {
        "outcome": "finished",
        "wrong_answers": sum(not same(ours, theirs) for ours, theirs in zip(answers, expected, strict=True)),
        "largest_difference": max(differences),
        "stall_s": float(stall_s),
        "stall_over_deadline": float(stall_s / LATE_AT_LEAST_S),
    }


def same(ours: Answer, theirs: Answer) -> bool:
    """Whether two answers agree within the tolerance, choice included; NaN agrees with nothing."""
    close = all(abs(a - b) <= TOLERANCE for a, b in zip(ours.log_likelihoods, theirs.log_likelihoods, strict=True))
    return close and np.argmax(ours.log_likelihoods) == np.argmax(theirs.log_likelihoods)


def window(station: Station) -> int | None:
    """How far back the model's attention sees."""
    return station.manifest.model.sliding_window


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the main thread when the time is up."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- nobody takes over -------------------------------------------------------------------------------------------------


def without_replacement(bundle: Path, plan: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    """Hit a device in each of many `wdmoe-bs run`."""
    address = free_address()
    moments: list[Moment] = []
    too_late = 0
    line = ["run", "--bundle", bundle, "--listen", address, "--dataset", "piqa-sample", "--policy", "exact"]
    line += ["--wire", "fp32", "--wait", 60]
    arguments = [str(word) for word in line]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lm_eval.evaluator", "wdmoe.bs.cli_run", "wdmoe.bs.station", "wdmoe.bs.harness"])
    with running_devices(bundle, address) as devices, tempfile.TemporaryDirectory(prefix="wdmoe-faults-") as scratch:
        log = Path(scratch) / "bs.log"

        def start() -> Any:
            devices.keep()
            log.write_bytes(b"")
            process = context.Process(target=run_command, args=(arguments, str(log)))
            process.start()
            wait_until(lambda: "connected: " in log.read_text() or process.exitcode is not None)
            return process

        def finish(process: Any, seconds: float) -> bool:
            process.join(seconds)
            if hung := process.exitcode is None:
                process.kill()
                process.join()
            return hung

        process = start()
        started_s = time.monotonic()
        hung = finish(process, 300.0)
        usual_s = time.monotonic() - started_s
        if hung or process.exitcode != 0:
            raise RuntimeError(f"an undisturbed run ended with exit code {process.exitcode}: {log.read_text()[-1000:]}")
        progress(f"none: {usual_s:.2f} s for an undisturbed run")
        queue = list(plan)
        while queue:
            victim, delay_s = f"device-{rng.integers(N_DEVICES)}", float(rng.uniform(0, min(3.0, 0.7 * usual_s)))
            moment: Moment = {"signal": queue[0], "victim": victim, "delay_ms": 1e3 * delay_s}
            process = start()
            time.sleep(delay_s)
            hit_s = time.monotonic()
            device = devices.by_name[victim]
            device.kill() if queue[0] == "SIGKILL" else device.freeze()
            hung = finish(process, HANG_S)
            took_s = time.monotonic() - hit_s
            devices.thaw()
            text = log.read_text()
            if process.exitcode == 0 and not hung and too_late < len(plan):
                too_late += 1
                continue
            queue.pop(0)
            error = next((part for part in text.splitlines() if part.startswith("Error: ")), "")
            named = process.exitcode == 1 and victim in error and "Traceback" not in text
            allowed = re.search(r"\(allowed ([0-9.]+) s\)", error)
            allowed_s = max(LATE_AT_LEAST_S, float(allowed[1])) if allowed else LATE_AT_LEAST_S
            moment |= {
                "outcome": "hang" if hung else "named" if named else "unnamed",
                "exit_code": process.exitcode,
                "error": error or text[-500:],
                "ended_after_s": took_s,
                "stall_over_deadline": took_s / allowed_s,
            }
            moments.append(moment)
            progress(f"none {len(moments)}/{len(plan)}: {json.dumps(moment)}")
    outcomes = [moment["outcome"] for moment in moments]
    return {
        "hangs": outcomes.count("hang"),
        "unnamed_ends": outcomes.count("unnamed"),
        "too_late": too_late,
        "p99_stall_over_deadline": percentile99([moment["stall_over_deadline"] for moment in moments]),
        "longest_end_s": max(moment["ended_after_s"] for moment in moments),
        "undisturbed_s": usual_s,
        "moments": moments,
    }


def run_command(arguments: Sequence[str], log: str) -> None:
    """Be `wdmoe-bs` in this process: its streams in a file, its exit code ours."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from wdmoe.bs.cli import main as bs

    bs(list(arguments), prog_name="wdmoe-bs")


def wait_until(is_true: Callable[[], bool]) -> None:
    """Look until something is so.

    Raises:
        TimeoutError: it is not in two minutes.
    """
    deadline_s = time.monotonic() + 120
    while not is_true():
        if time.monotonic() > deadline_s:
            raise TimeoutError("a base station found no devices in two minutes")
        time.sleep(0.01)


def percentile99(values: Sequence[float]) -> float:
    """The 99th percentile; infinite for no values, so that no bar is met by measuring nothing."""
    return float(np.percentile(values, 99)) if values else float("inf")


if __name__ == "__main__":
    main()
