"""Does an emulated device answer when its profile and its link say? Real sockets and processes, on loopback.

    python scripts/bench/emulation.py --json -

One `wdmoe-device --emulate` process at a time, over each of several links. The base station's hub sends it requests of
1 to 256 tokens, one after another, and takes the time from sending to the reply. Predicted is, from the tables alone,
round trip + bytes down and up / rate + the expert's time by the modelled profile + the median of the jitter. The bar:
`max_relative_error` of the medians <= 0.05; `bias` is their mean error with its sign, link by link: an emulator that is always
early or late shows there. `correction` is what the base station's latency model makes of the same replies; it should stay
near 1.

A process that waits for its turn is late by milliseconds, so cells during which others took more than a twentieth of the
processors are measured again, the most disturbed first, while there is time (`--minutes`), and the least disturbed
measurement of each counts, whatever its error. `disturbed_cells` of the result should be 0; where it is not, a miss may be
the machine's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import command, exit_on_sigterm, stop

from scripts.bench._environment import OTHERS_LIMIT, CpuUse, environment, progress, write_json
from scripts.bench._system import MODELS, READY_S, TINY, exported
from wdmoe.bs.hub import Complained, Hub, Replied
from wdmoe.profiles.link_profile import LinkProfile, link_names, modelled_link
from wdmoe.profiles.modelled import PRECISIONS, ExpertShape, hardware_names, modelled_profile
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.links import ZmqLink, listen
from wdmoe.runtime.manifest import BsManifest, read_manifest
from wdmoe.runtime.messages import MAX_ROWS, ExpertReply, ExpertRequest, Message, encode

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LINKS = ("wifi-6-near", "wifi-5ghz-mid", "wifi-5ghz-far")
SHAPE = ExpertShape(4096, 14336)
LEAST_CALLS, MOST_CALLS = 21, 400
WARM_UP_CALLS = 5
ANSWER_S = 30.0


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--device", type=click.Choice(hardware_names()), default="orin-nano-8gb", show_default=True)
@click.option("--link", "links", type=click.Choice(link_names()), multiple=True, default=LINKS, show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp16", show_default=True, help="Charged.")
@click.option("--tokens", "counts", type=int, multiple=True, default=TOKENS, show_default=True)
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Spent on each token count.")
@click.option(
    "--minutes", type=float, default=4.5, show_default=True,
    help="For everything: what the first measurements leave of it goes to cells that were disturbed.",
)  # fmt: skip
@click.option("--bar", type=float, default=0.05, show_default=True, help="Bound of the largest relative error.")
@click.option("--model", type=click.Choice(MODELS), default=TINY, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    target: str | None,
    device: str,
    links: Sequence[str],
    precision: str,
    counts: Sequence[int],
    seconds: float,
    minutes: float,
    bar: float,
    model: str,
    seed: int,
) -> None:
    """Compare an emulated device with its profile; exit code 1 if they differ by more than the bar."""
    exit_on_sigterm()
    started_s = time.monotonic()
    points: list[dict[str, Any]] = []
    corrections: dict[str, float] = {}
    with exported(model) as (name, bundle):
        manifest = read_manifest(bundle / "bs", BsManifest)
        use = CpuUse()
        for number, link_name in enumerate(links, start=1):
            options = ["--emulate", device, "--link", link_name, "--seed", str(seed), "--cost-precision", precision]
            options += ["--cost-shape", f"{SHAPE.d_model}x{SHAPE.d_ff}"]
            with emulated_device(bundle, manifest, options) as (hub, pid):

                def cell(tokens: int, hub: Hub = hub, pid: int = pid) -> Sample:
                    return measure(hub, manifest, tokens, seconds, pid)

                samples = measure_all(counts, cell, started_s + 60 * minutes * number / len(links), link_name)
                points += [compare(link_name, device, precision, samples[tokens]) for tokens in counts]
                (connected,) = hub.devices.values()
                corrections[link_name] = connected.latency.model().correction
        cpu = use.since()
    worst = max(points, key=lambda point: abs(point["relative_error"]))
    error = abs(worst["relative_error"])
    disturbed = sum(point["others_cpu_share"] > OTHERS_LIMIT for point in points)
    result: dict[str, Any] = {
        "max_relative_error": error,
        "worst": {key: worst[key] for key in ("link", "tokens")},
        "bar": bar,
        "passed": error <= bar,
        "bias": {
            link: float(np.mean([point["relative_error"] for point in points if point["link"] == link]))
            for link in links
        },
        "cells": len(points),
        "disturbed_cells": disturbed,
        "emulated": {"device": device, "precision": precision, "shape": f"{SHAPE.d_model}x{SHAPE.d_ff}", "seed": seed},
        "origin": "emulated",
        "correction": corrections,
        "model": name,
        "points": points,
        **cpu,
        **environment(("numpy", "pyzmq")),
    }
    progress(f"max_relative_error {error:.4f} (bar {bar}), bias {result['bias']}, corrections {corrections}")
    if disturbed:
        progress(
            f"{disturbed} of {len(points)} cells were disturbed by others on the machine: repeat it on a quiet one"
        )
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


@contextmanager
def emulated_device(bundle: Path, manifest: BsManifest, options: Sequence[str]) -> Iterator[tuple[Hub, int]]:
    """Run one device process of a bundle, connect it to a hub of our own; yield the hub and the process's id."""
    link: ZmqLink = listen("tcp://127.0.0.1:0", MAX_ROWS * manifest.model.d_model * 4)
    line = command("wdmoe-device", "--bundle", bundle / "device-0", "--bs", link.address, "--engine", "numpy", *options)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            hub = Hub(link, manifest, RealClock())
            deadline_s = time.monotonic() + READY_S
            while not any(device.latency.round_trip_ms for device in hub.devices.values()):
                if time.monotonic() > deadline_s or process.poll() is not None:
                    log.seek(0)
                    raise click.ClickException(f"the device did not come: {log.read().decode()[-2000:]}")
                hub.turn(0.05)
            yield hub, process.pid
            hub.close("done")
        finally:
            stop([process])
            link.close()


@dataclass(frozen=True, slots=True)
class Sample:
    """Requests of one size, one after another."""

    tokens: int
    times_ms: list[float]
    down_header_bytes: int
    up_header_bytes: int
    others_cpu_share: float  # of the whole machine, meanwhile


def measure_all(counts: Sequence[int], cell: Callable[[int], Sample], until_s: float, name: str) -> dict[int, Sample]:
    """Measure every token count, and again what others disturbed, the most disturbed first, until a moment.

    Args:
        counts: of tokens.
        cell: measures one.
        until_s: by the monotonic clock; the first measurements are made anyway.
        name: of the link, for the progress.
    """
    samples: dict[int, Sample] = {}
    waiting = list(counts)
    while waiting:
        tokens = waiting.pop(0)
        sample = cell(tokens)
        if tokens not in samples or sample.others_cpu_share < samples[tokens].others_cpu_share:
            samples[tokens] = sample
        progress(
            f"{name}, {tokens} tokens: {np.median(sample.times_ms):.2f} ms, {len(sample.times_ms)} calls, "
            f"others took {100 * sample.others_cpu_share:.0f} %"
        )
        if not waiting and time.monotonic() < until_s:
            again = max(samples.values(), key=lambda kept: kept.others_cpu_share)
            waiting += [again.tokens] if again.others_cpu_share > OTHERS_LIMIT else []
    return samples


def measure(hub: Hub, manifest: BsManifest, tokens: int, seconds: float, pid: int) -> Sample:
    """Send requests of one expert and so many rows, one after another, to the device with that process."""
    use = CpuUse([pid])
    (name,) = hub.devices
    device = hub.devices[name]
    block, expert = min(device.experts)
    rng = np.random.default_rng(tokens)
    rows = rng.standard_normal((tokens, manifest.model.d_model)).astype("<f2")
    index, weights = np.arange(tokens, dtype="<u4").tobytes(), np.ones(tokens, "<f4").tobytes()
    times_ms: list[float] = []
    started_s = time.perf_counter()
    reply_header = 0
    for number in range(1, WARM_UP_CALLS + MOST_CALLS + 1):
        request = ExpertRequest(number, block, tokens, "fp16", (expert,), (tokens,), index, weights)
        sent_s = time.perf_counter()
        hub.send(name, Message(request, rows))
        reply = next_reply(hub, number)
        took_ms = (time.perf_counter() - sent_s) * 1e3
        assert isinstance(reply.header, ExpertReply)
        reply_header = len(encode(reply)[0])
        if number > WARM_UP_CALLS:
            device.latency.observe_request(request.counts, took_ms - reply.header.queue_us / 1e3, tokens)
            times_ms.append(took_ms)
        if len(times_ms) >= LEAST_CALLS and time.perf_counter() - started_s > seconds:
            break
    share = use.since()["others_cpu_share"] or 0.0
    return Sample(tokens, times_ms, len(encode(Message(request, rows))[0]), reply_header, share)


def compare(link: str, device: str, precision: str, sample: Sample) -> dict[str, Any]:
    """Compare a sample with what the tables predict."""
    predicted_ms = predict_ms(device, precision, modelled_link(link), sample)
    p05_ms, p50_ms, p95_ms = map(float, np.percentile(sample.times_ms, (5, 50, 95)))
    return {
        "link": link,
        "tokens": sample.tokens,
        "calls": len(sample.times_ms),
        "predicted_p50_ms": predicted_ms,
        "measured_p05_ms": p05_ms,
        "measured_p50_ms": p50_ms,
        "measured_p95_ms": p95_ms,
        "relative_error": p50_ms / predicted_ms - 1,
        "others_cpu_share": sample.others_cpu_share,
    }


def next_reply(hub: Hub, number: int) -> Message:
    """Turn the loop until the reply to a request is there."""
    deadline_s = time.perf_counter() + ANSWER_S
    while time.perf_counter() < deadline_s:
        for event in hub.turn(0.5):
            if isinstance(event, Complained):
                raise click.ClickException(f"{event.device}: {event.text}")
            if isinstance(event, Replied):
                assert isinstance(event.message.header, ExpertReply) and event.message.header.request_id == number
                return event.message
    raise click.ClickException(f"no reply to request {number} in {ANSWER_S:g} s")


def predict_ms(device: str, precision: str, link: LinkProfile, sample: Sample) -> float:
    """Predict the median from the tables alone: nothing that the device process said is used."""
    rows_bytes = sample.tokens * 2 * SHAPE.d_model
    exchange_ms = link.exchange_ms(sample.down_header_bytes + rows_bytes, sample.up_header_bytes + rows_bytes)
    return exchange_ms + modelled_profile(device, precision, SHAPE).call_ms(sample.tokens)


if __name__ == "__main__":
    main()
