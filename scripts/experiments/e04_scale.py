"""Experiment 4: 2 to 1,000 devices, experts per device and copies of experts, per policy and medium; one live run.

    python scripts/experiments/e04_scale.py --data-dir DIR --json FILE --plot FILE.png

Simulated from what the routers say to text, charged as the testbed charges; the devices and links are the testbed's three
kinds in turn. What does not fit the memory of its devices is simulated all the same and marked. The live run is
twelve `wdmoe-device` processes on loopback, whose answers must be those of the model on three devices; its time is wall
time of this machine, and says nothing about the other figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path += [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parents[2])]
from processes import device_processes, free_address

from scripts.bench._system import piqa_questions
from scripts.experiments._frame import (
    TINY,
    UNMEASURED,
    Settings,
    Values,
    at_a_time,
    colour_of,
    experiment,
    hollow,
    marked_bars,
    progress,
    ratio_of_sums,
    spell,
    write_whole,
)
from scripts.experiments._model import TESTBED, bundle, devices, trace
from scripts.experiments._more import chosen, open_tapped
from wdmoe.bs.config import StationConfig
from wdmoe.bs.policies import Exact, parse_policy
from wdmoe.bs.questions import Answer
from wdmoe.bs.scoring import DistributedScorer
from wdmoe.bs.simulation import Bandwidth, Site, simulate, spread
from wdmoe.bs.station import open_station
from wdmoe.bs.trace import Trace
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.export.models import find_checkpoint
from wdmoe.export.placement import PlacementOptions
from wdmoe.profiles.modelled import experts_that_fit
from wdmoe.runtime.manifest import BsManifest, read_manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1000)
COPIES, COPIES_ON = (1, 2, 3, 4), 12
MEDIA: tuple[Bandwidth, ...] = ("shared", "uniform", "per-block")
EFFICIENCY = "6:4:2"
WINDOWS, LIVE_DEVICES, LIVE_ROWS = 12, 12, 6
TOLERANCE = 1e-3  # of a log-likelihood: other devices add in another order


def measure(settings: Settings) -> Values:
    """Simulate every number of devices and of copies; run twelve processes."""
    recorded = trace(settings, 8 if settings.short else 160)
    questions = range(3 if settings.short else WINDOWS)
    sizes = (2, 8, 24) if settings.short else SIZES
    names = ["exact", *chosen()]
    scale: dict[str, dict[str, list[Values]]] = {medium: {name: [] for name in names} for medium in MEDIA}
    copies: dict[str, dict[str, list[Values]]] = {medium: {name: [] for name in names} for medium in MEDIA}
    for medium in MEDIA:
        for grid, points in (
            (scale, [(size, 1) for size in sizes]),
            (copies, [(COPIES_ON, count) for count in COPIES[:: 3 if settings.short else 1]]),
        ):
            for size, count in points:
                for name, point in simulated(recorded, questions, medium, size, count, names).items():
                    grid[medium][name].append(point)
        progress(f"simulated up to {sizes[-1]} devices, {medium}")
    return {
        "questions": len(questions),
        "experts": recorded.n_experts,
        "scale": scale,
        "copies": copies,
        "live": live(settings),
    }


def simulated(
    recorded: Trace, questions: Sequence[int], medium: Bandwidth, size: int, copies: int, policies: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Simulate one number of devices and of copies under each policy, exact first."""
    turn = np.arange(size) % len(TESTBED.devices)
    hardware = [TESTBED.devices[k] for k in turn]
    efficiency = [TESTBED.efficiencies[EFFICIENCY][k] for k in turn]
    holders = spread(recorded.n_blocks, recorded.n_experts, size, min(copies, size))
    held = holders.sum(axis=(0, 1))  # of each device, over all blocks
    room = [experts_that_fit(name, TESTBED.cost_precision, TESTBED.shape) for name in hardware]
    longest = int(np.diff(recorded.starts).max())
    site = Site(devices(hardware, efficiency, up_to=longest), holders, medium, stage_ms=TESTBED.stage_ms)
    found: dict[str, dict[str, Any]] = {}
    exact_ms: list[float] = []
    for name in policies:
        result = simulate(recorded, site, parse_policy(name), questions)
        exact_ms = exact_ms or result.latency_ms
        ratio = ratio_of_sums(result.latency_ms, exact_ms)
        summary = result.summary()
        found[name] = {
            "devices": size,
            "copies": int(holders[0].sum(axis=1).min()),
            "experts_per_device": float(holders[0].sum() / size),
            "fits": bool((held <= room).all()),
            "latency_mean_ms": summary["latency_mean_ms"],
            "gain": [1 - ratio[0], 1 - ratio[2], 1 - ratio[1]],
            "gate_mass_dropped": summary["gate_mass_dropped"],
        }
    return found


def live(settings: Settings) -> Values:
    """Answer the bundled questions over device processes, each with its own experts, and in one process."""
    count, rows = (3, 2) if settings.short else (LIVE_DEVICES, LIVE_ROWS)
    folder = live_bundle(settings, count)
    with open_tapped(bundle(settings), wire="fp32") as station:
        questions = piqa_questions(station, rows)
        window = station.manifest.model.sliding_window
        expected = DistributedScorer(station.pipeline, Exact(), 1, window).score(questions)
    address = free_address()
    with device_processes(folder, address, ("--threads", 1), count):
        config = StationConfig(folder, address, wire="fp32", wait_s=180)
        with open_station(config, progress) as station:
            scorer = DistributedScorer(station.pipeline, Exact(), 1, window)
            scorer.score(questions[:1])  # the first calls allocate
            scorer.records.clear()
            started_s = time.perf_counter()
            answers = scorer.score(questions)
            wall_s = time.perf_counter() - started_s
    difference = max(
        abs(ours - theirs)
        for answer, reference in zip(answers, expected, strict=True)
        for ours, theirs in zip(answer.log_likelihoods, reference.log_likelihoods, strict=True)
    )
    return {
        "processes": count,
        "rows": rows,
        "largest_difference": difference,
        "equal": difference <= TOLERANCE and all(map(_same_choice, answers, expected)),
        "wall_ms_a_row": 1e3 * wall_s / rows,
        "beside": at_a_time() - 1,
        "wall_ms": [record.latency_ms for record in scorer.records],
    }


def live_bundle(settings: Settings, count: int) -> Path:
    """Return a bundle for `count` devices, each of which holds experts: they are dealt in turn over all blocks."""
    manifest = read_manifest(bundle(settings) / "bs", BsManifest)
    model = manifest.model
    target = settings.work / f"{bundle(settings).name}-dealt-to-{count}"
    if target.exists() and read_manifest(target / "bs", BsManifest).model == model:
        return target
    table = [[[(b * model.n_experts + e) % count] for e in range(model.n_experts)] for b in range(model.n_blocks)]
    placement = settings.work / f"placement-{count}.json"
    write_whole(placement, json.dumps({"placement": table}).encode())
    checkpoint = settings.work / "tiny-checkpoint"
    if settings.model != TINY:
        checkpoint, _ = find_checkpoint(settings.model, progress)
    config = ExportConfig(target, placement=PlacementOptions(file=placement), force=True)
    export_bundle(plan_export(checkpoint, settings.model, config), config)
    return target


def _best(answer: Answer) -> int:
    return int(np.argmax(answer.log_likelihoods))


def _same_choice(ours: Answer, theirs: Answer) -> bool:
    return _best(ours) == _best(theirs)


def finding(values: Values) -> str:
    """Word what the values show."""
    parts: list[str] = []
    exact = {medium: values["scale"][medium]["exact"] for medium in MEDIA}
    first, last = exact["per-block"][0], exact["per-block"][-1]
    parts.append(
        f"Modelled, from what the routers said to {values['questions']} windows of text. Under exact a window takes "
        f"{first['latency_mean_ms']:.0f} ms on {first['devices']} devices and {last['latency_mean_ms']:.0f} on "
        f"{last['devices']:,} with bandwidth for each block;"
    )
    for medium in ("shared", "uniform"):
        points = exact[medium]
        least = min(points, key=lambda point: float(point["latency_mean_ms"]))
        parts.append(
            f"{'on' if medium == 'shared' else 'with'} {medium} {'channel' if medium == 'shared' else 'bandwidth'} "
            f"{points[0]['latency_mean_ms']:.0f} and {points[-1]['latency_mean_ms']:.0f} ms, least with "
            f"{least['devices']:,} devices ({least['latency_mean_ms']:.0f} ms){';' if medium == 'shared' else '.'}"
        )
    said = []
    for name, points in values["scale"]["per-block"].items():
        if name == "exact":
            continue
        small, large = points[1], points[-1]
        said.append(
            f"{name} {_percent(small['gain'])} on {small['devices']} and {_percent(large['gain'])} on "
            f"{large['devices']:,} (leaving out {100 * large['gate_mass_dropped']:.0f} % of the gate weight)"
        )
    parts.append(f"Latency below exact's with bandwidth for each block: {'; '.join(said)}.")
    once, often = (values["copies"]["per-block"]["exact"][k] for k in (0, -1))
    change = often["latency_mean_ms"] / once["latency_mean_ms"] - 1
    parts.append(
        f"{often['copies']} devices for each expert instead of {once['copies']}, on {once['devices']}, change exact's "
        f"latency by {100 * change:+.0f} % with bandwidth for each block: exact asks one of them, and only policies ask others."
    )
    done = values["live"]
    parts.append(
        f"Live: {done['processes']} device processes on loopback answered {done['rows']} questions "
        f"{'as' if done['equal'] else 'NOT as'} the model in one process does (largest difference of a log-likelihood "
        f"{done['largest_difference']:.1e}), {done['wall_ms_a_row']:.0f} ms a question of this machine's wall time"
        f"{', beside other experiments' if done['beside'] else ''}."
    )
    return " ".join(parts)


def _percent(interval: Sequence[float]) -> str:
    return spell([100 * end for end in interval], ".0f") + " %"


def draw(values: Values, figure: Figure) -> None:
    """Draw latency over devices for each medium, and over copies."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter, ScalarFormatter, StrMethodFormatter

    figure.set_size_inches(11, 6.4)
    axes = figure.subplots(2, 3, sharex="row")
    for column, medium in enumerate(MEDIA):
        above, below = axes[0, column], axes[1, column]
        for name, points in values["scale"][medium].items():
            x = [point["devices"] for point in points]
            above.plot(x, [p["latency_mean_ms"] for p in points], color=colour_of(name), label=name, lw=1.2)
            for fits, marker in ((True, "o"), (False, "s")):
                some = [point for point in points if point["fits"] is fits]
                above.plot(
                    [p["devices"] for p in some], [p["latency_mean_ms"] for p in some], marker, ms=4, ls="none",
                    color=colour_of(name), markerfacecolor=colour_of(name) if name == "exact" else "white",
                )  # fmt: skip
        above.set(xscale="log", yscale="log" if medium == "uniform" else "linear", title=medium, xlabel="devices")
        sizes = [point["devices"] for point in values["scale"][medium]["exact"]]
        above.set_xticks(sizes[:: max(1, len(sizes) // 4)])
        above.xaxis.set_major_formatter(ScalarFormatter())
        above.xaxis.set_minor_formatter(NullFormatter())
        above.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        above.yaxis.set_minor_formatter(NullFormatter())
        for name, points in values["copies"][medium].items():
            if name == "exact":
                continue
            shift = 0.05 * (list(values["copies"][medium]).index(name) - 3)
            gains = [[100 * end for end in p["gain"]] for p in points]
            marked_bars(
                below, [p["copies"] + shift for p in points], gains, [False] * len(points), colour_of(name), lw=1
            )
        below.axhline(0, color="#bbbbbb", lw=0.8)
        below.set(xlabel=f"devices for each expert, of {COPIES_ON}", xticks=COPIES)
    axes[0, 0].set_ylabel("ms a window (modelled)")
    axes[1, 0].set_ylabel("latency below exact's, %\n(modelled)")
    too_large = Line2D([], [], ls="none", marker="s", ms=5, color="#555555", label="experts do not fit the devices")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], too_large, hollow(UNMEASURED)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle("Scale: latency over devices, and over devices for each expert with 95 % intervals", fontsize=9)


main = experiment("Two to a thousand devices, experts per device, copies", measure, finding, draw)

if __name__ == "__main__":
    main()
