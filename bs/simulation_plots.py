"""Plots of a simulation: latency by policy, and latency against what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wdmoe.bs.plots import COLORS, MARKERS, new_figure, require_matplotlib, save_figure, style


def draw_simulation(result: dict[str, Any], path: Path) -> None:
    """Draw both side by side, and say in the picture that it is modelled.

    Args:
        result: of `wdmoe-bs simulate`.
        path: its ending decides the format.

    Raises:
        WdmoeError: matplotlib is not installed, or cannot write there.
    """
    require_matplotlib("--plot")
    entries = result["results"]
    with style():
        figure = new_figure(11, max(4.5, 1.8 + 0.3 * len(entries)))
        bars, pareto = figure.subplots(1, 2, width_ratios=(1, 1.2))
        names = [entry["policy"] for entry in entries]
        mean = [entry["latency_mean_ms"] for entry in entries]
        bars.barh(names, mean, color=COLORS[0])
        p95 = [entry["latency_p95_ms"] for entry in entries]
        bars.plot(p95, range(len(names)), "|", color=COLORS[1], markersize=12, markeredgewidth=2, label="95 % within")
        bars.invert_yaxis()
        bars.set_xlabel("latency of a question, ms (modelled): mean")
        figure.legend(loc="outside lower left", ncols=6)
        dropped = [100 * entry["gate_mass_dropped"] for entry in entries]
        front = pareto_front(list(zip(dropped, mean, strict=True)))
        pareto.plot(*zip(*front, strict=True), color="#bbbbbb", zorder=1)
        for number, (name, x, y) in enumerate(zip(names, dropped, mean, strict=True)):
            drawn = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
            pareto.plot(x, y, linestyle="none", markersize=8, label=name, **drawn)
        # Names beside their points would lie on each other where policies come out alike.
        pareto.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
        pareto.set_xlabel("gate weight left out, %")
        pareto.set_ylabel("mean latency, ms (modelled)")
        pareto.set_ylim(0, 1.15 * max(mean))
        pareto.margins(x=0.1)
        devices = sum(result["devices"].values())
        medium = result["channel"] if result["bandwidth"] is None else f"{result['channel']}, {result['bandwidth']}"
        figure.suptitle(f"{result['model']['name']}: {devices} modelled devices, {medium}", fontsize=10)
        save_figure(figure, path)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both, ascending in the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
