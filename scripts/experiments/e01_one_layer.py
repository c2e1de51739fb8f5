"""Experiment 1: one MoE layer on two and three devices with equal shares of the band: who is waited for, and round robin.

    python scripts/experiments/e01_one_layer.py --data-dir DIR --json FILE --plot FILE.png

Each block of the model is looked at alone, on every window of text. Experts are either on one device each (`exact`), or on
all devices, which are dealt their rows in turn (`round-robin`): equal work for unequal devices.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import Settings, Values, experiment, ratio_of_sums, spell
from scripts.experiments._model import TESTBED, devices, trace
from wdmoe.bs.airtime import load_of, makespan
from wdmoe.bs.simulation import Replicas, Site, spread
from wdmoe.bs.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLEETS = {  # devices, and bit/s/Hz of each
    "two devices": (("agx-orin-64gb", "orin-nano-8gb"), (6.0, 2.0)),
    "three devices": (TESTBED.devices, TESTBED.efficiencies["6:4:2"]),
    "three alike": (("orin-nx-16gb",) * 3, (4.0, 4.0, 4.0)),
}
ARMS = ("exact", "round-robin")


def measure(settings: Settings) -> Values:
    recorded = trace(settings, 8 if settings.short else 160)
    fleets: Values = {}
    for fleet, (hardware, efficiency) in FLEETS.items():
        model = devices(hardware, efficiency)
        arms: Values = {"devices": list(hardware), "efficiency": list(efficiency)}
        for arm in ARMS:
            copies = len(hardware) if arm == "round-robin" else 1
            holders = spread(recorded.n_blocks, recorded.n_experts, len(hardware), copies)
            arms[arm] = layer_times(recorded, Site(model, holders, "uniform"))
        arms["round_robin_over_exact"] = ratio_of_sums(arms["round-robin"]["layer_ms"], arms["exact"]["layer_ms"])
        fleets[fleet] = arms
    return {"windows": recorded.n_questions, "layers": recorded.n_blocks, "fleets": fleets}


def layer_times(recorded: Trace, site: Site) -> Values:
    """Return what a layer takes under the model's own choice, the mean over layers for each window, and who is last."""
    model, n_devices = site.now(), site.model.n_devices
    layer_ms = np.zeros((recorded.n_questions, recorded.n_blocks))
    finish_ms, parts_ms, last = np.zeros(n_devices), np.zeros((3, n_devices)), np.zeros(n_devices)
    for block, holders in enumerate(site.holders):
        replicas = Replicas.of(holders)
        for window in range(recorded.n_questions):
            experts = replicas.deal(recorded.routing(block, window).experts)
            n_pairs = len(replicas.device)
            load = load_of(experts, np.ones(experts.shape, np.bool_), replicas.device[experts], n_pairs, n_devices)
            took = makespan(load, model)
            layer_ms[window, block] = took.total_ms
            finish_ms += took.finish_ms
            parts_ms += [load.rows * model.row_air_ms, load.compute_ms(model), 2 * model.way_ms * (load.rows > 0)]
            last[took.finish_ms.argmax()] += 1
    layers = layer_ms.size
    return {
        "layer_ms": layer_ms.mean(axis=1).tolist(),
        "finish_ms": (finish_ms / layers).tolist(),
        "air_ms": (parts_ms[0] / layers).tolist(),
        "compute_ms": (parts_ms[1] / layers).tolist(),
        "round_trip_ms": (parts_ms[2] / layers).tolist(),
        "last_share": (last / layers).tolist(),
    }


def finding(values: Values) -> str:
    said = [f"Over {values['windows']} windows of text and {values['layers']} layers, with equal shares of the band."]
    for fleet, arms in values["fleets"].items():
        exact = arms["exact"]
        slowest = int(np.argmax(exact["last_share"]))
        idle = 1 - np.mean(np.delete(exact["finish_ms"], slowest)) / exact["finish_ms"][slowest]
        said.append(
            f"{fleet}: a layer takes {np.mean(exact['layer_ms']):.1f} ms, {arms['devices'][slowest]} (number "
            f"{slowest + 1}) is the last in {exact['last_share'][slowest]:.0%} of layers, and the others are done "
            f"{max(0.0, idle):.0%} earlier; round robin over copies of all experts takes "
            f"{spell(arms['round_robin_over_exact'], '.2f')} times as long."
        )
    over = [arms["round_robin_over_exact"] for arms in values["fleets"].values()]
    said.append(
        f"Round robin is faster on {sum(high < 1 for _, _, high in over)} and slower on {sum(low > 1 for _, low, _ in over)} of "
        f"{len(over)} fleets. It evens out rows, whatever a device and its link can do; every device then reads the weights of "
        "every expert, and keeps all of them in memory."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    axes = figure.subplots(1, len(values["fleets"]), sharey=True)
    for place, (fleet, arms) in zip(np.atleast_1d(axes), values["fleets"].items(), strict=True):
        names = [f"{name}\n{e:g} bit/s/Hz" for name, e in zip(arms["devices"], arms["efficiency"], strict=True)]
        at = np.arange(len(names))
        for offset, arm, hatch in ((-0.2, "exact", ""), (0.2, "round-robin", "///")):
            below = np.zeros(len(names))
            for part, colour in (("round_trip_ms", "#bbbbbb"), ("air_ms", "#4477aa"), ("compute_ms", "#ddaa33")):
                height = np.array(arms[arm][part])
                label = f"{part.removesuffix('_ms').replace('_', ' ')}, {arm}" if fleet == "three alike" else None
                place.bar(at + offset, height, 0.36, below, color=colour, hatch=hatch, edgecolor="white", label=label)
                below += height
        place.set_xticks(
            at, [name.replace("-orin", "\norin").replace("orin-n", "orin\nn") for name in names], fontsize=7
        )
        place.set_title(fleet)
    np.atleast_1d(axes)[0].set_ylabel("mean time of a layer on a device, ms (modelled)")
    np.atleast_1d(axes)[-1].legend(fontsize=7)


main = experiment("One MoE layer on two and three devices", measure, finding, draw)

if __name__ == "__main__":
    main()
