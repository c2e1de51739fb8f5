"""Experiment 7: how many experts a token gets, decided in real time, by four rules, at equal counts.

    python scripts/experiments/e07_experts_per_token.py --data-dir DIR --json FILE --plot FILE.png

`ser` asks each token alone how much less its second expert weighs; `top-cut` with a budget takes the least weights of a block
first; `bottleneck` takes them where the slowest device is unloaded; `capacity` takes what exceeds a device's share. Three
unequal devices on one shared channel.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
from scripts.experiments._frame import MISSES, Settings, Values, colour_of, experiment, hollow, marked_bars, spell
from scripts.experiments._model import TESTBED, compared, open_arm, reaches_bar, read, windows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES = {
    "ser": [f"ser:t={t}" for t in (0.1, 0.2, 0.4, 0.7)],
    "top-cut": [f"top-cut:budget={b}" for b in (0.02, 0.05, 0.1, 0.2)],
    "bottleneck": [f"bottleneck:budget={b}" for b in (0.02, 0.05, 0.1, 0.2)],
    "capacity": [f"capacity:factor={f}" for f in (1.4, 1.1, 0.8)],
}
EFFICIENCY, MEDIUM = "6:4:2", "shared"


def measure(settings: Settings) -> Values:
    rules = {rule: policies[1:2] if settings.short else policies for rule, policies in RULES.items()}
    with open_arm(settings, TESTBED.arm(EFFICIENCY, MEDIUM)) as station:
        everyone = [policy for policies in rules.values() for policy in policies]
        readings = read(station, everyone, windows(settings, station, 2 if settings.short else 56))
    found = compared(readings)
    named = iter(list(found.items())[1:])
    return {
        "windows": len(readings["exact"].records),
        "exact_pairs_per_token": found["exact"]["pairs_per_token"],
        "rules": {rule: dict(next(named) for _ in policies) for rule, policies in rules.items()},
        "bars": {"perplexity_ratio": TESTBED.bars.perplexity_ratio, "divergence": TESTBED.bars.divergence},
    }


def cheapest(arms: dict[str, Values]) -> str | None:
    """Return the fastest of a rule's settings at the bar of quality."""
    at_bar = [name for name, arm in arms.items() if reaches_bar(arm)]
    return min(at_bar, key=lambda name: arms[name]["latency_ratio"][0], default=None)


def cost_of_pairs(values: Values, arms: dict[str, Values]) -> float:
    """Return by how much perplexity rises, in percent, for each tenth of a pair a token less: the slope through exact."""
    less = np.array([values["exact_pairs_per_token"] - arm["pairs_per_token"] for arm in arms.values()])
    nats = np.log([arm["perplexity_ratio"][0] for arm in arms.values()])
    return float(100 * 0.1 * (less @ nats) / (less @ less)) if less.any() else 0.0


def finding(values: Values) -> str:
    said = [f"{values['windows']} windows; exact sends {values['exact_pairs_per_token']:.2f} pairs a token and block."]
    for rule, arms in values["rules"].items():
        cost = f"{rule}: a tenth of a pair less costs {cost_of_pairs(values, arms):.2f} % of perplexity"
        best = cheapest(arms)
        if best is None:
            said.append(f"{cost}; no setting reaches the bar of quality.")
            continue
        arm = arms[best]
        said.append(
            f"{cost}; its fastest setting at the bar, {best}, sends {arm['pairs_per_token']:.2f} pairs in "
            f"{spell(arm['latency_ratio'])} of the time, at a perplexity ratio of {spell(arm['perplexity_ratio'])} and "
            f"{spell(arm['divergence'])} nats."
        )
    order = sorted(values["rules"], key=lambda rule: cost_of_pairs(values, values["rules"][rule]))
    said.append(f"From the cheapest pairs to the dearest: {', '.join(order)}.")
    return " ".join(said)


def draw(values: Values, figure: Figure) -> None:
    quality, latency = figure.subplots(1, 2)
    full = values["exact_pairs_per_token"]
    for rule, arms in values["rules"].items():
        ordered = sorted(arms.values(), key=lambda arm: -arm["pairs_per_token"])
        pairs = [full, *(arm["pairs_per_token"] for arm in ordered)]
        for axes, key in ((quality, "perplexity_ratio"), (latency, "latency_ratio")):
            intervals = [[1.0] * 3, *(arm[key] for arm in ordered)]
            good = [True, *map(reaches_bar, ordered)]
            marked_bars(axes, pairs, intervals, good, colour_of(rule), rule)
    quality.axhline(
        values["bars"]["perplexity_ratio"], color="#117733", linestyle="--", linewidth=1, label="bar of quality"
    )
    quality.set_ylabel("perplexity, ratio to exact")
    latency.set_ylabel("latency, ratio to exact (modelled)")
    for axes in (quality, latency):
        axes.set_xlabel("pairs (token, device) sent for a token in a block")
        axes.invert_xaxis()
    quality.legend(handles=[*quality.get_legend_handles_labels()[0], hollow(MISSES)], fontsize=8)
    figure.suptitle("How many experts a token gets: three unequal emulated devices, one shared channel", fontsize=10)


main = experiment("Experts per token in real time", measure, finding, draw)

if __name__ == "__main__":
    main()
