"""Experiment 2: WLR against exact over its threshold theta: latency and quality.

    python scripts/experiments/e02_wlr.py --data-dir DIR --json FILE --plot FILE.png

`alpha` is where theta begins; with gamma = 1 the first step that raises the weight-to-latency ratio at all is taken. A larger
gamma makes theta rise until that much is gained. Three unequal devices with equal shares of the band.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import MISSES, Settings, Values, error_bars, experiment, hollow, marked_bars, spell
from scripts.experiments._model import TESTBED, compared, open_arm, reaches_bar, read, windows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
GAMMAS = (1.05, 1.2, 1.5)
EFFICIENCY, MEDIUM = "6:4:2", "uniform"
_SAME = 0.005  # of both ratios, below which two points are one to the eye


def measure(settings: Settings) -> Values:
    alphas, gammas = (ALPHAS[-1:], GAMMAS[:1]) if settings.short else (ALPHAS, GAMMAS)
    policies = [f"wlr:alpha={alpha:g},gamma=1" for alpha in alphas] + [f"wlr:gamma={gamma:g}" for gamma in gammas]
    with open_arm(settings, TESTBED.arm(EFFICIENCY, MEDIUM)) as station:
        readings = read(station, policies, windows(settings, station, 2 if settings.short else 64))
    found = list(compared(readings).values())
    return {
        "windows": len(readings["exact"].records),
        "by_alpha": [{"alpha": a, **arm} for a, arm in zip(alphas, found[1:], strict=False)],
        "by_gamma": [{"gamma": g, **arm} for g, arm in zip(gammas, found[1 + len(alphas) :], strict=True)],
        "bars": {"perplexity_ratio": TESTBED.bars.perplexity_ratio, "divergence": TESTBED.bars.divergence},
    }


def finding(values: Values) -> str:
    arms = values["by_alpha"] + values["by_gamma"]
    names = [f"alpha {a['alpha']:g}" for a in values["by_alpha"]] + [
        f"gamma {a['gamma']:g}" for a in values["by_gamma"]
    ]
    named = dict(zip(names, arms, strict=True))
    least = min(named, key=lambda name: named[name]["perplexity_ratio"][0])
    fastest = min(named, key=lambda name: named[name]["latency_ratio"][0])
    said = [
        f"{values['windows']} windows, against exact:",
        *(
            f"{why} ({name}) {spell(named[name]['latency_ratio'])} of the latency at a perplexity ratio of "
            f"{spell(named[name]['perplexity_ratio'])}, {spell(named[name]['divergence'])} nats of KL, "
            f"{named[name]['dropped_share']:.0%} of droppable pairs left out, theta {named[name]['theta']:.2f} in the mean;"
            for why, name in (("mildest", least), ("fastest", fastest))
        ),
    ]
    at_bar = [name for name, arm in named.items() if reaches_bar(arm)]
    gaining = [name for name in at_bar if named[name]["latency_ratio"][2] < 1]
    if gaining:
        best = min(gaining, key=lambda name: named[name]["latency_ratio"][0])
        said.append(f"at the bar of quality and faster: {', '.join(gaining)}, at best {best}.")
    else:
        idle = f", {len(at_bar)} of them by leaving out next to nothing" if at_bar else ""
        said.append(f"none of the {len(named)} settings is both at the bar of quality and faster than exact{idle}.")
    shares = [arm["dropped_share"] for arm in values["by_alpha"]]
    said.append(
        f"Over alpha the share of pairs left out goes from {min(shares):.0%} to {max(shares):.0%}: theta chooses among tokens by "
        "how their weight lies to the devices' speed, not by which device finishes last nor by what the token loses."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    over_theta, plane = figure.subplots(1, 2)
    by_alpha, by_gamma, bars = values["by_alpha"], values["by_gamma"], values["bars"]
    alpha = [arm["alpha"] for arm in by_alpha]
    for key, label, colour in (
        ("latency_ratio", "latency (modelled)", "#4477aa"),
        ("perplexity_ratio", "perplexity", "#cc6677"),
    ):
        error_bars(over_theta, alpha, [arm[key] for arm in by_alpha], label=label, color=colour)
    over_theta.plot(
        alpha, [1 - arm["dropped_share"] for arm in by_alpha], ":", color="#888888", label="pairs kept, of droppable"
    )
    over_theta.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    over_theta.set_xlabel("alpha: where theta begins (gamma = 1)")
    over_theta.set_ylabel("ratio to exact")
    over_theta.legend(fontsize=8)
    for arms, marker, key, name, colour, beside in (
        (by_alpha, "o", "alpha", "gamma = 1, over alpha", "#4477aa", (6, 4)),
        (by_gamma, "s", "gamma", "alpha = 0.5, over gamma", "#cc6677", (-6, -4)),
    ):
        x = [arm["latency_ratio"][0] for arm in arms]
        good = [reaches_bar(arm) for arm in arms]
        marked_bars(plane, x, [arm["perplexity_ratio"] for arm in arms], good, colour, name, marker=marker, ls="none")
        for at, text in labels(arms, key):
            # One series to the right, the other to the left: their points may lie on each other.
            plane.annotate(
                text, at, xytext=beside, textcoords="offset points", fontsize=7, color=colour, zorder=4,
                ha="left" if beside[0] > 0 else "right", va="bottom" if beside[1] > 0 else "top",
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip
    plane.plot([1], [1], "*", color="black", markersize=9, label="exact")
    plane.axhline(bars["perplexity_ratio"], color="#117733", linestyle="--", linewidth=1, label="bar of quality")
    plane.set_xlabel("latency, ratio to exact (modelled)")
    plane.set_ylabel("perplexity, ratio to exact")
    plane.margins(x=0.12)
    plane.legend(handles=[*plane.get_legend_handles_labels()[0], hollow(MISSES)], fontsize=8)
    figure.suptitle("WLR on three unequal emulated devices, equal shares of the band", fontsize=10)


def labels(arms: Sequence[Values], key: str) -> list[tuple[tuple[float, float], str]]:
    """Return where which setting is named; settings that lie on each other are named together."""
    found: list[tuple[tuple[float, float], str]] = []
    for arm in arms:
        at, text = (arm["latency_ratio"][0], arm["perplexity_ratio"][0]), f"{arm[key]:g}"
        same = next((n for n, (other, _) in enumerate(found) if math.dist(at, other) < _SAME), None)
        if same is None:
            found.append((at, text))
        else:
            found[same] = (found[same][0], f"{found[same][1]}, {text}")
    return found


main = experiment("WLR over its threshold", measure, finding, draw)

if __name__ == "__main__":
    main()
