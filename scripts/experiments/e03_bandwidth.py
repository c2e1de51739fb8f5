"""Experiment 3: bandwidth divided anew for each block against uniform and static shares, with and without selection.

    python scripts/experiments/e03_bandwidth.py --data-dir DIR --json FILE --plot FILE.png

Latency alone: what a division does to answers is nothing. Static shares are fitted to the first quarter of the windows, and
all divisions are compared on the rest. Besides the testbed's devices, eight in a fading cell, one expert of each block on
each.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import UNMEASURED, Settings, Values, colour_of, experiment, ratio_of_sums, spell
from scripts.experiments._model import TESTBED, devices, trace
from wdmoe.bs.airtime import LatencyModel
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.radio import Cell, RadioConfig
from wdmoe.bs.simulation import Bandwidth, Site, block_loads, holders_of, simulate, spread, static_shares
from wdmoe.bs.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES = ("exact", "wlr", "bottleneck")
DIVISIONS: tuple[Bandwidth, ...] = ("uniform", "static", "per-block")
CELL = RadioConfig()


def measure(settings: Settings) -> Values:
    recorded = trace(settings, 8 if settings.short else 160)
    fitted = range(recorded.n_questions // 4)
    compared = range(recorded.n_questions // 4, recorded.n_questions)
    places: Values = {}
    for place, site in sites(recorded).items():
        still = site if site.cell is None else replace(site, cell=None, model=without_fading(site))
        shares = static_shares(*block_loads(recorded, still, fitted))
        took: dict[str, list[float]] = {}
        for division in DIVISIONS:
            for policy in POLICIES:
                cell = None if site.cell is None else Cell(CELL, site.model.n_devices, 0)  # the same fading for all
                static = shares if division == "static" else None
                divided = replace(site, bandwidth=division, shares=static, cell=cell)
                took[f"{division}, {policy}"] = simulate(recorded, divided, parse_policy(policy), compared).latency_ms
        control = took["uniform, exact"]
        places[place] = {
            "ratios": {name: ratio_of_sums(latency, control) for name, latency in took.items()},
            "perblock_over_static": ratio_of_sums(took["per-block, exact"], took["static, exact"]),
            "shares": shares.tolist(),
        }
    return {"windows": len(compared), "places": places}


def sites(recorded: Trace) -> dict[str, Site]:
    """Return where: the testbed's devices at both sets of efficiencies, and eight devices in a fading cell."""
    stage_ms = TESTBED.stage_ms
    found = {
        f"3 devices, {name} bit/s/Hz": Site(
            devices(TESTBED.devices, efficiency), holders_of(recorded.placement), stage_ms=stage_ms
        )
        for name, efficiency in TESTBED.efficiencies.items()
    }
    many = (*TESTBED.devices, "orin-nx-16gb") * 2
    model = devices(many, (1.0,) * len(many))  # the rates come from the cell
    holders = spread(recorded.n_blocks, recorded.n_experts, len(many))
    row_bits = 16.0 * TESTBED.shape.d_model
    found["8 devices, fading cell"] = Site(
        model, holders, stage_ms=stage_ms, cell=Cell(CELL, len(many), 0), row_bits=row_bits
    )
    return found


def without_fading(site: Site) -> LatencyModel:
    """Return the model of a cell's devices where they are, at the rates without fading: what static shares can know."""
    down, up = Cell(replace(CELL, fading=False), site.model.n_devices, 0).efficiencies()
    bits_per_ms = CELL.mhz * 1e3  # at 1 bit/s/Hz
    return site.model.with_rates(site.row_bits / (down * bits_per_ms), site.row_bits / (up * bits_per_ms))


def finding(values: Values) -> str:
    said = [f"{values['windows']} windows, latency as a share of exact's with uniform bandwidth:"]
    for place, found in values["places"].items():
        ratios = found["ratios"]
        alone, both = (1 - ratios[f"per-block, {policy}"][0] for policy in ("exact", "wlr"))
        of_all = (
            f"{alone / both:.0%} of what it gains together with wlr" if both > 0 else "while wlr with it gains nothing"
        )
        said.append(
            f"{place}: static {spell(ratios['static, exact'])}, per block {spell(ratios['per-block, exact'])}, which is "
            f"{spell(found['perblock_over_static'])} of static, and {of_all} ({spell(ratios['per-block, wlr'])}); "
            f"with bottleneck {spell(ratios['per-block, bottleneck'])}."
        )
    said.append(
        "Bandwidth changes no answer, so this part of a total over uniform shares costs nothing and is no policy's."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    from matplotlib.patches import Patch

    axes = figure.subplots(1, len(values["places"]), sharey=True)
    for place, (name, found) in zip(axes, values["places"].items(), strict=True):
        for n, policy in enumerate(POLICIES):
            intervals = np.array([found["ratios"][f"{division}, {policy}"] for division in DIVISIONS])
            at = np.arange(len(DIVISIONS)) + 0.27 * (n - 1)
            spreads = np.maximum(0, [intervals[:, 0] - intervals[:, 1], intervals[:, 2] - intervals[:, 0]])
            colour = colour_of(policy)
            face = colour if policy == "exact" else "white"  # what selection does to answers is not known here
            place.bar(
                at, intervals[:, 0], 0.22, yerr=spreads, capsize=2, color=face, edgecolor=colour, ecolor=colour,
                linewidth=1.4, label=policy,
            )  # fmt: skip
        place.set_xticks(range(len(DIVISIONS)), DIVISIONS)
        place.set_title(name, fontsize=9)
        place.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("latency, ratio to exact on uniform shares (modelled)")
    unknown = Patch(facecolor="white", edgecolor="#555555", label=UNMEASURED)
    handles = [*axes[-1].get_legend_handles_labels()[0], unknown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


main = experiment("Bandwidth for each block, static and uniform", measure, finding, draw)

if __name__ == "__main__":
    main()
