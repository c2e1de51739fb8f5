"""What requests in pieces gain: prompts through three unequal emulated devices, whole and in pieces.

    python scripts/bench/chunking.py --json -
    python scripts/bench/chunking.py --real --tokens 256 --json -

One prompt at a time, exact, on the testbed's devices (testbed.toml): on its links, where the air is nearly all of a block,
and on wires, where computing takes about as long as the way. Times are modelled; with --real, the devices are processes on
loopback that hold their answers back, and the base station's own clock counts. The last token's logits are compared. No bar:
it reports.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
from processes import exit_on_sigterm, stop

from scripts.bench._environment import CpuUse, environment, progress, write_json
from scripts.bench.testbed import CONFIG, Testbed, placed_bundle, read_testbed
from scripts.bench.virtual_against_real import start_devices
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.experiment import load_tokenizer
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact
from wdmoe.bs.records import Record
from wdmoe.bs.routing import Floats
from wdmoe.bs.rows import read_rows
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import Station, open_station
from wdmoe.bs.virtual import open_virtual_station

WAYS = ("none", "auto")
TESTBED = "testbed"  # the links of its first set of efficiencies, on one channel


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option(
    "--tokens", "lengths", multiple=True, type=click.IntRange(min=1), default=(64, 128, 256, 512), show_default=True
)
@click.option(
    "--link", "links", multiple=True, default=(TESTBED, "ethernet-1g"), show_default=True, help="Of all devices."
)
@click.option("--model", help="Instead of the testbed's; tiny: a random one.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts of each length.")
@click.option("--real", is_flag=True, help="Device processes and wall time instead of virtual time.")
def main(
    target: str | None,
    lengths: Sequence[int],
    links: Sequence[str],
    model: str | None,
    repeat: int,
    real: bool,
) -> None:
    """Compare whole requests with requests in pieces."""
    exit_on_sigterm()
    testbed, use = read_testbed(CONFIG), CpuUse()
    found: dict[str, Any] = {}
    with placed_bundle(model or testbed.model, testbed) as bundle:
        for link in links:
            arm = testbed.arm(next(iter(testbed.efficiencies)), "shared")
            arm = arm if link == TESTBED else replace(arm, links=(link,) * len(arm.devices))
            answered = {}
            for split in WAYS:
                with opened(bundle, testbed, arm, split, real) as station:
                    answered[split] = [[prompt(station, n, k) for k in range(repeat)] for n in lengths]
            for n, whole, pieces in zip(lengths, answered["none"], answered["auto"], strict=True):
                found[f"{link}, {n} tokens"] = compared(whole, pieces)
                progress(f"{link}, {n} tokens: " + words(found[f"{link}, {n} tokens"]))
    result = {
        "origin": "emulated devices; " + ("real sockets and wall time" if real else "virtual time"),
        "repeat": repeat,
        "prompts": found,
        **use.since(),
        **environment(("numpy", "onnxruntime")),
    }
    if target is not None:
        write_json(target, result)


@contextmanager
def opened(bundle: Path, testbed: Testbed, arm: VirtualConfig, split: Any, real: bool) -> Iterator[Station]:
    """Open a station on emulated devices."""
    if not real:
        config = StationConfig(bundle, wire=testbed.wire, split=split, threads=1)
        with open_virtual_station(config, arm, lambda text: None) as station:
            yield station
        return
    devices, address = start_devices(bundle, testbed, arm)
    try:
        devices.keep()
        config = StationConfig(bundle, address, wire=testbed.wire, split=split, bandwidth=arm.bandwidth)
        with open_station(config, lambda text: None) as station:
            prompt(station, 64, 0)  # so that nobody waits for memory any more
            yield station
    finally:
        stop([device.process for device in devices.by_name.values() if device.process is not None])


def prompt(station: Station, tokens: int, number: int) -> tuple[Record, Floats]:
    """Run a prompt of so many tokens of the bundled questions; return its record and the logits of the last token."""
    text = "\n".join(str(row) for row in read_rows("piqa-sample"))
    ids = load_tokenizer(station).encode(text).ids
    start = number * tokens % max(1, len(ids) - tokens)
    part = np.resize(ids[start:], tokens).tolist()
    microbatch = pack_sequence(f"prompt {number}", part, new_cache(station.manifest, tokens), None, all_logits=True)
    ((_, result, record),) = station.pipeline.run([microbatch], Exact())
    assert result.logits is not None
    return record, result.logits[-1]


def compared(whole: Sequence[tuple[Record, Floats]], pieces: Sequence[tuple[Record, Floats]]) -> dict[str, Any]:
    """Put times, requests and the distance of the answers beside each other."""
    ways = {"whole": whole, "in_pieces": pieces}
    requests = {
        way: sum(device.requests for record, _ in done for device in record.devices.values()) / len(done)
        for way, done in ways.items()
    }
    ms = {way: median(record.latency_ms for record, _ in done) for way, done in ways.items()}
    return {
        "latency_ms": ms,
        "gain": 1 - ms["in_pieces"] / ms["whole"],
        "requests": requests,
        "largest_difference_of_a_logit": max(
            float(np.abs(a - b).max()) for (_, a), (_, b) in zip(whole, pieces, strict=True)
        ),
    }


def words(found: dict[str, Any]) -> str:
    """Put a comparison on one line."""
    (whole, pieces), (few, many) = found["latency_ms"].values(), found["requests"].values()
    return f"{whole:.0f} ms whole, {pieces:.0f} ms in pieces ({found['gain']:+.1%}; {few:.0f} and {many:.0f} requests)"


if __name__ == "__main__":
    main()
