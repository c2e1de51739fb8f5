"""How far is the system from what its stages, links and devices allow? Emulated devices on three qualities of WiFi.

    python scripts/bench/bound.py --json -

The real base station and device processes over loopback, in wall time: a random model of 8 blocks, hidden size 2048, 16
experts of which each token takes 8, on four unequal emulated devices (charged as experts of 2048x1024, float16), each on
a half-duplex WiFi channel of its own. The bound is made of inputs alone:

    air      fewest bytes (unique pairs of row and device x width x bytes on the wire, both ways) / nominal rate
    stage    the graphs of a block and the head, run in this process while the devices are idle
    device   profile time of the rows that the routers send there

One question alone cannot take less than the sum over blocks of stage + the longest air + device; many of them not less,
each, than the largest of the sums of one stage worker, one link, one device. `measured_over_bound` is the worst ratio of
medians; the bar is 1.15. Round trip and jitter of a link are no part of the bound; what of the excess is theirs, and what
is the steps' own work beside the graphs, stands in `excess_ms`. Times of links and devices are emulated.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT)]
import tiny
from processes import command, exit_on_sigterm, free_address, stop

from scripts.bench._environment import CpuUse, environment, progress, undisturbed, write_json
from scripts.bench._system import DeviceProcess, Devices
from wdmoe.bs.cli_common import read_in_flight
from wdmoe.bs.config import InFlight, StationConfig
from wdmoe.bs.microbatch import Microbatch, pack_questions
from wdmoe.bs.policies import Exact
from wdmoe.bs.questions import Choice, Question
from wdmoe.bs.records import Record
from wdmoe.bs.routing import Floats, route
from wdmoe.bs.stages import Stages, rope_angles
from wdmoe.bs.station import Station, open_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.profiles.link_profile import LinkProfile, link_names, modelled_link
from wdmoe.profiles.modelled import ExpertShape, modelled_profile

BLOCKS, EXPERTS, TOP_K, D_MODEL, D_FF = 8, 16, 8, 2048, 1024
HARDWARE = ("agx-orin-64gb", "orin-nx-16gb", "orin-nx-8gb", "orin-nano-8gb")
LINKS = ("wifi-5ghz-near", "wifi-5ghz-mid", "wifi-5ghz-far")
WIRE_BYTES = 2  # of a number, float16
BAR = 1.15
QUESTIONS = 4  # different ones, asked in turn
STAGE_ROUNDS = 9
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What one question asks of everybody at least, all in ms."""

    stage_ms: float  # graphs of all blocks, and the head
    critical_ms: float  # sum over blocks of the longest air + device
    air_ms: tuple[float, ...]  # of each link, sum over blocks
    device_ms: tuple[float, ...]  # of each device, sum over blocks

    @property
    def alone_ms(self) -> float:
        """The least that the question can take."""
        return self.stage_ms + self.critical_ms

    @property
    def resources_ms(self) -> dict[str, float]:
        """How long the busiest of each kind works for it."""
        return {"stages": self.stage_ms, "air": max(self.air_ms), "devices": max(self.device_ms)}


@dataclass(frozen=True, slots=True)
class Asked:
    """What routers send to one device in one block."""

    rows: int
    counts: tuple[int, ...]  # rows of each expert called


@click.command()
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, allow_dash=True), help="Keep the result; - prints it."
)
@click.option("--link", "links", type=click.Choice(link_names()), multiple=True, default=LINKS, show_default=True)
@click.option("--rows", type=click.IntRange(min=8), default=64, show_default=True, help="Of a question, about.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Of all questions.")
@click.option("--in-flight", callback=read_in_flight, default="auto", show_default=True, help="Under saturated load.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of the stages.")
@click.option("--d-model", type=int, default=D_MODEL, show_default=True)
@click.option(
    "--attempts", type=click.IntRange(min=1), default=ATTEMPTS, show_default=True, help="While others compute."
)
@click.option("--trace", type=click.Path(path_type=Path, file_okay=False), help="Folder for a timeline of each link.")
def main(
    target: str | None,
    links: Sequence[str],
    rows: int,
    rounds: int,
    in_flight: InFlight,
    threads: int,
    d_model: int,
    attempts: int,
    trace: Path | None,
) -> None:
    """Measure; exit code 1 if anything takes longer than the bar allows."""
    exit_on_sigterm()
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-bound-") as scratch:
        checkpoint = tiny.tiny_checkpoint(
            Path(scratch) / "checkpoint", "qwen3_moe", dtype="bfloat16", hidden_size=d_model, head_dim=64,
            num_hidden_layers=BLOCKS, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=8,
        )  # fmt: skip
        config = ExportConfig(Path(scratch) / "bundle", devices=len(HARDWARE))
        export_bundle(plan_export(checkpoint, "bound", config), config)
        microbatches = [pack_questions([question(rows, number)], None) for number in range(QUESTIONS)]
        for name in links:
            timeline = trace / f"{name}.json" if trace is not None else None
            with open_system(config.out, name, threads, timeline) as (station, pids):
                asked = asked_of(station, microbatches)
                idle = Stages(station.folder, station.manifest, threads)
                for load in ("alone", "saturated"):
                    point, watched = undisturbed(
                        partial(
                            measure, load, station, idle, microbatches, asked, modelled_link(name), rounds, in_flight
                        ),
                        attempts,
                        partial(CpuUse, pids),
                    )
                    points.append({"link": name, "load": load, **point, **watched})
                    progress(_line(points[-1]))
    worst = max(point["measured_over_bound"] for point in points)
    result = {
        "measured_over_bound": worst,
        "bar": BAR,
        "passed": worst <= BAR,
        "origin": "real sockets and wall time; devices and links emulated",
        "points": points,
        "model": {"d_model": d_model, "blocks": BLOCKS, "experts": EXPERTS, "top_k": TOP_K, "charged_d_ff": D_FF},
        "rows": [len(microbatch.token_ids) for microbatch in microbatches],
        "devices": HARDWARE,
        "threads": threads,
        **environment(("numpy", "onnxruntime", "pyzmq")),
    }
    progress(f"worst measured over bound {worst:.2f}, bar {BAR}")
    if target is not None:
        write_json(target, result)
    sys.exit(0 if result["passed"] else 1)


def question(rows: int, number: int) -> Question:
    """Make a question of two choices, a quarter of its rows in them."""
    ids = np.random.default_rng((rows, number)).integers(0, 256, rows + 2).tolist()
    context, eighth = rows * 3 // 4, max(1, rows // 8)
    first, second = ids[context : context + eighth], ids[context + eighth : context + 2 * eighth]
    head = tuple(ids[:context])
    return Question(f"q/{number}", (Choice(head, (*first, 1)), Choice(head, (*second, 2))))


@contextmanager
def open_system(bundle: Path, link: str, threads: int, trace: Path | None) -> Iterator[tuple[Station, list[int]]]:
    """Start a base station and its emulated devices; stop everything at the end."""
    address, devices = free_address(), Devices()
    for number, hardware in enumerate(HARDWARE):
        name = f"device-{number}"
        options = ["--bundle", bundle / name, "--bs", address, "--emulate", hardware, "--link", link]
        options += ["--cost-shape", f"{_width(bundle)}x{D_FF}", "--cost-precision", "fp16", "--seed", number]
        devices.by_name[name] = DeviceProcess(name, command("wdmoe-device", *options), bundle / f"{name}.log")
    try:
        devices.keep()
        config = StationConfig(bundle, address, threads=threads, trace=trace)
        with open_station(config, lambda text: None) as station:
            yield station, [device.pid for device in devices.by_name.values()]
    finally:
        stop([device.process for device in devices.by_name.values() if device.process is not None])


def asked_of(station: Station, microbatches: Sequence[Microbatch]) -> list[list[list[Asked]]]:
    """Work out what the routers send: [microbatch][block][device], from their logits and the placement alone."""
    model, placement = station.manifest.model, station.manifest.placement
    found: list[list[list[Asked]]] = []

    def on_router(block: int, logits: Floats) -> None:
        experts = route(logits, model.top_k, model.norm_top_k).experts  # [rows, k]
        owner = np.array([holders[0] for holders in placement[block]])[experts]
        counts = np.bincount(experts.ravel(), minlength=model.n_experts)
        found[-1].append(
            [
                Asked(
                    int((owner == k).any(axis=1).sum()),
                    tuple(int(n) for e, n in enumerate(counts) if placement[block][e][0] == k and n),
                )
                for k in range(len(HARDWARE))
            ]
        )

    station.pipeline.on_router = on_router
    for microbatch in microbatches:
        found.append([])
        list(station.pipeline.run([microbatch], Exact()))
    station.pipeline.on_router = None
    return found


def least_work(asked: Sequence[Sequence[Asked]], stage_ms: float, link: LinkProfile, d_model: int) -> Work:
    """Say what a question takes at least of everybody.

    Args:
        asked: [block][device].
        stage_ms: of all blocks and the head.
        link: of every device.
        d_model: width of a row.
    """
    profiles = [modelled_profile(name, "fp16", ExpertShape(d_model, D_FF)) for name in HARDWARE]
    air_ms = np.array([[link.row_ms(one.rows * d_model * WIRE_BYTES) for one in block] for block in asked])
    device_ms = np.array(
        [[sum(map(p.call_ms, one.counts)) for p, one in zip(profiles, block, strict=True)] for block in asked]
    )
    critical_ms = float((air_ms + device_ms).max(axis=1).sum())
    return Work(stage_ms, critical_ms, tuple(air_ms.sum(axis=0).tolist()), tuple(device_ms.sum(axis=0).tolist()))


def idle_stage_ms(stages: Stages, station: Station, microbatch: Microbatch, rounds: int) -> float:
    """Run the graphs of all blocks and the head with nobody else at work; the sum of their medians."""
    model = station.manifest.model
    angles = rope_angles(model.rope, microbatch.positions)
    times_ms: list[list[float]] = []
    for _ in range(rounds):
        residual, moe_out, took_ms = None, None, []
        for block in range(model.n_blocks):
            started_s = time.perf_counter()
            attended = stages.attend(block, microbatch, angles, residual, moe_out)
            took_ms.append((time.perf_counter() - started_s) * 1e3)
            residual, moe_out = attended.residual, attended.hidden  # as good as what experts would have said
        assert residual is not None and moe_out is not None
        started_s = time.perf_counter()
        stages.finish(microbatch, residual, moe_out)
        times_ms.append([*took_ms, (time.perf_counter() - started_s) * 1e3])
    return float(np.median(times_ms, axis=0).sum())


def measure(
    load: str,
    station: Station,
    idle: Stages,
    microbatches: Sequence[Microbatch],
    asked: Sequence[Sequence[Sequence[Asked]]],
    link: LinkProfile,
    rounds: int,
    in_flight: InFlight,
) -> dict[str, Any]:
    """Measure one load between two measurements of idle stages, and put the bound beside it."""
    before_ms = [idle_stage_ms(idle, station, microbatch, STAGE_ROUNDS // 2 + 1) for microbatch in microbatches]
    if load == "alone":
        records = [r for _ in range(rounds) for _, _, r in station.pipeline.run(microbatches, Exact())]
        measured_ms = median(record.latency_ms for record in records)
    else:
        records, measured_ms = saturated(station, microbatches, rounds, in_flight)
    after_ms = [idle_stage_ms(idle, station, microbatch, STAGE_ROUNDS // 2 + 1) for microbatch in microbatches]
    stages_ms = [(before + after) / 2 for before, after in zip(before_ms, after_ms, strict=True)]
    width = station.manifest.model.d_model
    works = [least_work(one, ms, link, width) for one, ms in zip(asked, stages_ms, strict=True)]
    sums_ms = {name: median(work.resources_ms[name] for work in works) for name in works[0].resources_ms}
    bound_ms = median(work.alone_ms for work in works) if load == "alone" else max(sums_ms.values())
    return {
        "measured_over_bound": measured_ms / bound_ms,
        "measured_ms": measured_ms,
        "bound_ms": bound_ms,
        "stages_ms": sums_ms["stages"],
        "critical_ms": median(work.critical_ms for work in works),
        "largest_sums_ms": sums_ms,
        "in_flight": int(median(record.in_flight for record in records)),
        "questions": len(records),
        "excess_ms": excess(records, sums_ms["stages"], link, measured_ms - bound_ms) if load == "alone" else None,
        "split_ms": split(records),
    }


def saturated(
    station: Station, microbatches: Sequence[Microbatch], rounds: int, in_flight: InFlight
) -> tuple[list[Record], float]:
    """Keep questions coming; return the median time of one, over rounds of all questions.

    What is in flight lands in bursts, so a round is as many questions as make whole bursts of each question.
    """
    if in_flight == "auto":
        warm_up = (microbatches[number % QUESTIONS] for number in range(2 * QUESTIONS))
        in_flight = int(median(record.in_flight for _, _, record in station.pipeline.run(warm_up, Exact(), "auto")))
    each = QUESTIONS * in_flight
    total = in_flight + rounds * each
    stream = (microbatches[number % QUESTIONS] for number in range(total + in_flight))
    records: list[Record] = []
    landed_s: list[float] = []
    for _, _, record in station.pipeline.run(stream, Exact(), in_flight):
        landed_s.append(station.hub.clock.now_s())
        records.append(record)
    marks = landed_s[in_flight - 1 : total : each]
    return records[in_flight:total], median((b - a) * 1e3 / each for a, b in itertools.pairwise(marks))


def excess(records: Sequence[Record], stages_ms: float, link: LinkProfile, excess_ms: float) -> dict[str, float]:
    """Say where the time beyond the bound went, for one question at a time."""
    steps_ms = median(record.bs_ms for record in records) - stages_ms
    round_trips_ms = BLOCKS * link.round_trip_ms
    # A block waits for the last of its devices: the mean of the largest of so many exponential delays.
    jitter_ms = BLOCKS * link.jitter_ms * sum(1 / k for k in range(1, len(HARDWARE) + 1))
    return {
        "total": excess_ms,
        "steps_beside_graphs": steps_ms,
        "round_trips": round_trips_ms,
        "jitter_expected": jitter_ms,
        "rest": excess_ms - steps_ms - round_trips_ms - jitter_ms,
    }


def split(records: Sequence[Record]) -> dict[str, float]:
    """Return medians of the split of time of a question."""
    return {
        "latency": median(record.latency_ms for record in records),
        "bs": median(record.bs_ms for record in records),
        "waiting": median(sum(block.waiting_ms for block in record.blocks) for record in records),
        "air": median(sum(block.air_ms for block in record.blocks) for record in records),
        "device": median(sum(block.device_ms for block in record.blocks) for record in records),
    }


def _width(bundle: Path) -> int:
    from wdmoe.runtime.manifest import BsManifest, read_manifest

    return read_manifest(bundle / "bs", BsManifest).model.d_model


def _line(point: dict[str, Any]) -> str:
    disturbed = f", others took {point['others_cpu_share']:.0%}" if point["others_cpu_share"] else ""
    return (
        f"{point['link']}, {point['load']}: {point['measured_ms']:.1f} ms, bound {point['bound_ms']:.1f} ms, "
        f"ratio {point['measured_over_bound']:.2f}{disturbed}"
    )


if __name__ == "__main__":
    main()
