"""Latency against quality of all policies over their options, with the bar of quality: the Pareto plot.

    python scripts/experiments/pareto.py --data-dir DIR --json FILE --plot FILE.png

The testbed's three unequal devices (6:4:2 bit/s/Hz), one question at a time, on a shared channel and with bandwidth divided anew
for each block. Each policy reads the same windows of training text; latency is modelled, what it does to the text is real.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import (
    MISSES,
    Settings,
    Values,
    colour_of,
    experiment,
    hollow,
    marked_bars,
    progress,
    spell,
)
from scripts.experiments._model import TESTBED, compared, open_arm, reaches_bar, read, windows
from wdmoe.bs.simulation_plots import pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES = (
    *(f"wlr:gamma={gamma}" for gamma in (1.0, 1.05, 1.2)),
    *(f"ser:t={t}" for t in (0.2, 0.4)),
    *(f"top-cut:budget={budget}" for budget in (0.05, 0.1)),
    *(f"capacity:factor={factor}" for factor in (1.0, 1.2)),
    *(f"bottleneck:budget={budget}" for budget in (0.05, 0.1)),
    "wlr:alpha=1,loss=0.0075",
    "top-cut:pairs=true,loss=0.0075",
    "capacity:factor=0.6,loss=0.0075",
    *(f"bottleneck:loss={loss},renormalise=false" for loss in (0.00375, 0.0075, 0.015)),
)
EFFICIENCY, MEDIA = "6:4:2", ("shared", "per-block")
_TOP = 1.5  # perplexity ratio, beyond which a policy is only named at the edge


def measure(settings: Settings) -> Values:
    media: Values = {}
    for medium in MEDIA:
        progress(f"pareto: {medium}")
        with open_arm(settings, TESTBED.arm(EFFICIENCY, medium)) as station:
            policies = POLICIES[9:11] if settings.short else POLICIES
            text = windows(settings, station, 2 if settings.short else 48)
            media[medium] = compared(read(station, policies, text))
    bars = {"perplexity_ratio": TESTBED.bars.perplexity_ratio, "divergence": TESTBED.bars.divergence}
    return {"windows": len(text), "media": media, "bars": bars}


def finding(values: Values) -> str:
    bars = values["bars"]
    bar = (
        f"a perplexity ratio of at most {bars['perplexity_ratio']:g} and at most {bars['divergence']:g} nats of mean KL"
    )
    said = [f"{values['windows']} windows; the bar is {bar}."]
    for medium, arms in values["media"].items():
        rivals = {name: arm for name, arm in arms.items() if name != "exact"}
        at_bar = [name for name, arm in rivals.items() if reaches_bar(arm)]
        if not at_bar:
            near = min(rivals, key=lambda name: rivals[name]["perplexity_ratio"][0])
            said.append(
                f"{medium}: none of {len(rivals)} settings reaches it; the nearest is {near}, at a ratio of "
                f"{spell(rivals[near]['perplexity_ratio'])} and {spell(rivals[near]['divergence'])} nats."
            )
            continue
        best = min(at_bar, key=lambda name: rivals[name]["latency_ratio"][0])
        said.append(
            f"{medium}: {len(at_bar)} of {len(rivals)} settings reach it; the fastest is {best}, {spell(arms[best]['latency_ratio'])} "
            f"of exact's latency at a ratio of {spell(arms[best]['perplexity_ratio'])} and {spell(arms[best]['divergence'])} nats."
        )
        wlr = {name: arm for name, arm in rivals.items() if name.startswith("wlr")}
        if wlr:
            mildest = min(wlr, key=lambda name: wlr[name]["perplexity_ratio"][0])
            said.append(
                f"wlr at its mildest ({mildest}) takes {spell(wlr[mildest]['latency_ratio'])} at a ratio of "
                f"{spell(wlr[mildest]['perplexity_ratio'])}."
            )
    said.append(
        "Whether a policy holds over 5,000 rows of questions is for wdmoe-bs quality to say, not for this plot."
    )
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes, (medium, arms) in zip(figure.subplots(1, 2, sharey=True), values["media"].items(), strict=True):
        families: dict[str, list[Values]] = {}
        for name, arm in arms.items():
            kind = name.partition(":")[0]
            families.setdefault(f"{kind} with a loss" if "loss=" in name else kind, []).append(arm)
        for policy, members in families.items():
            ordered = sorted(members, key=lambda arm: arm["latency_ratio"][0])
            x = [arm["latency_ratio"][0] for arm in ordered]
            y = [[min(end, _TOP) for end in arm["perplexity_ratio"]] for arm in ordered]
            style: dict[str, Any] = {"marker": "*", "ms": 11} if policy == "exact" else {}
            if policy.endswith("loss"):
                style |= {"marker": "D", "ls": "--"}
            good = [reaches_bar(arm) for arm in ordered]
            marked_bars(axes, x, y, good, colour_of(policy.partition(" ")[0]), policy, linewidth=0.8, **style)
        points = [(arm["latency_ratio"][0], min(arm["perplexity_ratio"][0], _TOP)) for arm in arms.values()]
        front = pareto_front(points)
        axes.step(
            *zip(*front, strict=True),
            where="post",
            color="#bbbbbb",
            linewidth=4,
            alpha=0.5,
            zorder=0,
            label="Pareto front",
        )
        axes.axhspan(
            0.9,
            values["bars"]["perplexity_ratio"],
            color="#117733",
            alpha=0.12,
            linewidth=0,
            label="perplexity within the bar",
        )
        axes.set_ylim(0.98, min(_TOP, max(1.06, 1.02 * max(y for _, y in points))))
        axes.set_title("one shared channel" if medium == "shared" else "bandwidth divided for each block", fontsize=9)
        axes.set_xlabel("latency, ratio to exact (modelled)")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))  # where the range is narrow, numbers are long
    figure.axes[0].set_ylabel("perplexity, ratio to exact (real)")
    handles = [*figure.axes[1].get_legend_handles_labels()[0], hollow(f"{MISSES},\nby perplexity or KL")]
    figure.legend(handles=handles, loc="outside right center", fontsize=8)
    figure.suptitle("Three unequal emulated devices, a small real model: faster is left, better is down", fontsize=10)


main = experiment("Latency against quality", measure, finding, draw)

if __name__ == "__main__":
    main()
