"""Plots of a simulation: latency by policy, and latency against what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wdmoe.runtime.errors import WdmoeError


def draw_simulation(result: dict[str, Any], path: Path) -> None:
    """Draw both side by side, and say in the picture that it is modelled.

    Args:
        result: of `wdmoe-bs simulate`.
        path: its ending decides the format.

    Raises:
        WdmoeError: matplotlib is not installed, or cannot write there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WdmoeError(f"--plot needs matplotlib ({error}): pip install 'wdmoe[plots]'") from error
    entries = result["results"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, pareto = figure.subplots(1, 2, width_ratios=(1, 1.2))
    names = [entry["policy"] for entry in entries]
    mean = [entry["latency_mean_ms"] for entry in entries]
    bars.barh(names, mean, color="#4477aa")
    bars.plot([entry["latency_p95_ms"] for entry in entries], range(len(names)), "|", color="black", label="95 %")
    bars.invert_yaxis()
    bars.set_xlabel("latency of a question, ms (modelled): mean")
    bars.legend(loc="lower right", frameon=False)
    dropped = [100 * entry["gate_mass_dropped"] for entry in entries]
    front = pareto_front(list(zip(dropped, mean, strict=True)))
    pareto.plot(*zip(*front, strict=True), color="#bbbbbb", zorder=1)
    pareto.scatter(dropped, mean, color="#4477aa", zorder=2)
    for name, x, y in zip(names, dropped, mean, strict=True):
        pareto.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    pareto.set_xlabel("gate weight left out, %")
    pareto.set_ylabel("mean latency, ms (modelled)")
    pareto.set_ylim(0, 1.15 * max(mean))
    pareto.margins(x=0.2)
    devices = sum(result["devices"].values())
    medium = result["channel"] if result["bandwidth"] is None else f"{result['channel']}, {result['bandwidth']}"
    figure.suptitle(f"{result['model']['name']}: {devices} modelled devices, {medium}", fontsize=10)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=140)
    except (OSError, ValueError) as error:
        raise WdmoeError(f"cannot write the plot {path}: {error}") from error
    partial.replace(path)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both, ascending in the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
