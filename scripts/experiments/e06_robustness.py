"""Experiment 6: what a policy is worth when the gate is noisy, a profile is wrong, channels fade, or a device slows down.

    python scripts/experiments/e06_robustness.py --data-dir DIR --json FILE --plot FILE.png

On the testbed's devices in virtual time. Two fleets: `air-bound`, the testbed's shared channel at 6:4:2 bit/s/Hz, for all; and
`compute-bound`, the same devices on a medium of 10 Gbit/s, for what devices take: where the air is most of a block, it hides
whether a profile is right. Gate: the router's logits are divided by a
temperature, or get Gaussian noise of so many times their spread, for exact as for every policy. Profiles: the slowest device
really takes half or twice what it says, and the live correction is left on or off; `told` knows. (The order of sending keeps
what was said.) Fading: simulated over a trace in five cells, with fading and without, known to who decides. Slow-down: the
slowest device takes four times as long from the middle of the text on.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
    ratio_of_sums,
    spell,
    table,
)
from scripts.experiments._model import TESTBED, Reading, bundle, devices, reaches_bar, read, trace, windows
from scripts.experiments._more import KNOW_LATENCY, chosen, open_tapped, slower
from wdmoe.bs.config import VirtualConfig
from wdmoe.bs.microbatch import pack_questions
from wdmoe.bs.policies import parse_policy
from wdmoe.bs.radio import Cell, RadioConfig
from wdmoe.bs.routing import Floats
from wdmoe.bs.simulation import Site, holders_of, simulate
from wdmoe.bs.station import Station
from wdmoe.bs.virtual import VirtualDevice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GATES = {  # temperature, and noise over the logits' spread
    "as it is": (1.0, 0.0),
    "temperature 0.5": (0.5, 0.0),
    "temperature 2": (2.0, 0.0),
    "noise 0.5": (1.0, 0.5),
    "noise 1": (1.0, 1.0),
}
TAKES = {"half as fast": 2.0, "twice as fast": 0.5}  # as the slowest device says: time over what it says
KNOWN = ("told", "corrected", "not corrected")
SLOWEST, SLOW_DOWN = "device-2", 4.0
WINDOWS, SLOW_WINDOWS, CELLS = 8, 12, 5
ARM = TESTBED.arm("6:4:2", "shared")
FLEETS = {
    "air-bound": ARM,
    "compute-bound": VirtualConfig(
        TESTBED.devices, ("radio:mhz=10000:efficiency=1:rtt_ms=0.2",), "shared", None, TESTBED.shape,
        TESTBED.cost_precision, TESTBED.stage_ms,
    ),
}  # fmt: skip


def measure(settings: Settings) -> Values:
    count = 2 if settings.short else WINDOWS
    return {
        "windows": count,
        "gate": gate(settings, count),
        "profile": {fleet: profiles(settings, count, arm) for fleet, arm in FLEETS.items()},
        "fading": fading(settings, count),
        "slow_down": {
            fleet: slow_down(settings, 4 if settings.short else SLOW_WINDOWS, arm) for fleet, arm in FLEETS.items()
        },
    }


def gate(settings: Settings, count: int) -> Values:
    """Read text with other gates, under exact and every policy."""
    found: Values = {}
    names = chosen()
    for what, (temperature, noise) in GATES.items():
        with open_tapped(bundle(settings), ARM) as station:
            station.pipeline.stages = Disturbed(station.pipeline.stages, disturbed(temperature, noise, 1 + len(names)))
            readings = read(station, names, windows(settings, station, count))
        exact = readings["exact"]
        found[what] = {
            name: {
                **over_exact(reading, exact),
                "gate_mass_dropped": reading.summary.gate_mass_dropped,
                "nats": reading.nats,
            }
            for name, reading in readings.items()
        }
        progress(f"gate, {what}: done")
    return found


def over_exact(reading: Reading, exact: Reading) -> Values:
    """Return latency and quality of a reading against exact's."""
    return {
        "latency_over_exact": ratio_of_sums(reading.latency_ms, exact.latency_ms),
        "perplexity_ratio": reading.perplexity_ratio(exact),
        "divergence": reading.mean_divergence(),
    }


class Disturbed:
    """Stages whose router's logits are changed before the choice is made."""

    def __init__(self, stages: Any, disturb: Callable[[int, Floats], None]) -> None:
        self._stages, self._disturb = stages, disturb

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)

    def attend(self, block: int, *rest: Any) -> Any:
        """Run stage `block`, and change what its router said."""
        attended = self._stages.attend(block, *rest)
        self._disturb(block, attended.router_logits)
        return attended


def disturbed(temperature: float, noise: float, policies: int) -> Callable[[int, Floats], None]:
    """Return what changes the router's logits in place: the same noise for each of the policies that read a window."""
    begun = 0

    def disturb(block: int, logits: Floats) -> None:
        nonlocal begun
        begun += block == 0
        logits /= temperature
        if noise:
            rng = np.random.default_rng((block, (begun - 1) // policies))
            logits += noise * logits.std(axis=1).mean() * rng.standard_normal(logits.shape, np.float32)

    return disturb


def profiles(settings: Settings, count: int, arm: VirtualConfig) -> Values:
    """Read text while the slowest device is not what it says."""
    names = chosen(*KNOW_LATENCY)
    found: Values = {}
    for what, factor in TAKES.items():
        found[what] = {}
        for known in KNOWN:
            with open_tapped(bundle(settings), arm, lambda device, f=factor: tired(device, f)) as station:  # type: ignore[misc]
                tracker = station.hub.devices[SLOWEST].latency
                if known == "told":
                    tracker.profile = slower(tracker.profile, factor)
                if known != "corrected":
                    stop_correcting(station)
                readings = read(station, names, windows(settings, station, count))
            exact = readings["exact"]
            found[what][known] = {
                name: {**over_exact(readings[name], exact), "latency_ms": readings[name].latency_ms} for name in names
            }
        progress(f"profile, {what}: done")
    return found


def tired(device: VirtualDevice, factor: float) -> VirtualDevice:
    """Let the slowest device take longer than it says, or less long."""
    if device.name == SLOWEST:
        device.air.profile = slower(device.profile, factor)
    return device


def stop_correcting(station: Station) -> None:
    """Believe the profiles, whatever is measured."""
    for device in station.hub.devices.values():
        device.latency.ratios = deque(maxlen=0)


def fading(settings: Settings, count: int) -> Values:
    """Simulate the same questions in cells with fading and without."""
    recorded = trace(settings, 8 if settings.short else 160)
    model = devices(TESTBED.devices, TESTBED.efficiencies["6:4:2"])
    found: Values = {}
    for what, fades in (("still", False), ("fading", True)):
        taken: dict[str, list[float]] = {}
        dropped: dict[str, list[float]] = {}
        for seed in range(2 if settings.short else CELLS):
            for name in ("exact", *chosen()):
                # A cell anew for each policy: the same places and the same fading.
                cell = Cell(RadioConfig(fading=fades, mhz=TESTBED.bandwidth_mhz), model.n_devices, seed)
                site = Site(
                    model, holders_of(recorded.placement), "per-block", None, TESTBED.stage_ms, cell,
                    16.0 * TESTBED.shape.d_model,
                )  # fmt: skip
                result = simulate(recorded, site, parse_policy(name), range(count))
                taken.setdefault(name, []).extend(result.latency_ms)
                dropped.setdefault(name, []).append(result.summary()["gate_mass_dropped"])
        found[what] = {
            name: {
                "latency_mean_ms": float(np.mean(taken[name])),
                "latency_over_exact": ratio_of_sums(taken[name], taken["exact"]),
                "gate_mass_dropped": float(np.mean(dropped[name])),
            }
            for name in taken
        }
    return found


def slow_down(settings: Settings, count: int, arm: VirtualConfig) -> Values:
    """Read text while the slowest device becomes slower; each policy from the beginning, corrected and not."""
    found: Values = {}
    for name in ("exact", *chosen(*KNOW_LATENCY)):
        found[name] = {}
        for known in KNOWN[1:]:
            met: list[VirtualDevice] = []

            def meet(device: VirtualDevice, met: list[VirtualDevice] = met) -> VirtualDevice:
                met.append(device)
                return device

            latency_ms: list[float] = []
            with open_tapped(bundle(settings), arm, meet) as station:
                if known != "corrected":
                    stop_correcting(station)
                for number, window in enumerate(windows(settings, station, count)):
                    if number == count // 2:
                        for device in met:
                            tired(device, SLOW_DOWN)
                    packed = pack_questions([window], station.manifest.model.sliding_window)
                    ((_, _, record),) = station.pipeline.run([packed], parse_policy(name))
                    latency_ms.append(record.latency_ms)
            found[name][known] = latency_ms
    for by_known in found.values():
        half = count // 2
        for known in KNOWN[1:]:
            after, exact = by_known[known][half:], found["exact"][known][half:]
            by_known[f"{known}, over exact after"] = ratio_of_sums(after, exact)
    return found


def finding(values: Values) -> str:
    gates, names = values["gate"], [name for name in values["gate"]["as it is"] if name != "exact"]
    worst = {name: max(gates, key=lambda what: float(gates[what][name]["perplexity_ratio"][0])) for name in names}
    damaged = max(names, key=lambda name: float(gates[worst[name]][name]["perplexity_ratio"][0]))
    still, faded = values["fading"]["still"], values["fading"]["fading"]
    slower_by = faded["exact"]["latency_mean_ms"] / still["exact"]["latency_mean_ms"] - 1
    shifts = [abs(faded[name]["latency_over_exact"][0] - still[name]["latency_over_exact"][0]) for name in names]
    said = [
        (
            f"On {values['windows']} windows of text (modelled times, real answers), over exact in the same trouble. The gate harms "
            f"{damaged} most, {_two(gates[worst[damaged]][damaged]['perplexity_ratio'])} of exact's perplexity with {worst[damaged]}. "
            f"Fading changes exact's latency by {100 * slower_by:+.0f} %, and what policies gain over it by at most "
            f"{100 * max(shifts):.0f} points."
        )
    ]
    for fleet in values["profile"]:
        cases = _cases(values, fleet)
        gain = {
            case: by_known["not corrected"][0] - by_known["corrected"][0]
            for case, by_known in cases.items()
            if "not corrected" in by_known
        }
        most = max(gain, key=lambda case: gain[case])
        sure = cases[most]["corrected"][2] < cases[most]["not corrected"][1]
        said.append(
            f"{fleet.capitalize()}, correcting profiles live is worth at most {100 * gain[most]:.1f} points of exact's latency "
            f"({most[1]}, {most[0]}; the intervals {'do not overlap' if sure else 'overlap'})."
        )
    quality = table(
        (
            "policy",
            "perplexity, gate as it is",
            "latency",
            "at worst with",
            "perplexity",
            "latency",
            "still air",
            "fading",
        ),
        [
            [
                name,
                *(_two(gates["as it is"][name][key]) for key in ("perplexity_ratio", "latency_over_exact")),
                worst[name],
                *(_two(gates[worst[name]][name][key]) for key in ("perplexity_ratio", "latency_over_exact")),
                *(_two(air[name]["latency_over_exact"]) for air in (still, faded)),
            ]
            for name in names
        ],
    )
    speed = table(
        ("fleet, slowest device, policy", *(f"latency, {known}" for known in KNOWN)),
        [
            [f"{fleet}, {what}, {name}", *(_two(by_known[known]) if known in by_known else "-" for known in KNOWN)]
            for fleet in values["profile"]
            for (what, name), by_known in _cases(values, fleet).items()
        ],
    )
    return f"{' '.join(said)}\n\n{quality}\n\n{speed}"


def _cases(values: Values, fleet: str) -> dict[tuple[str, str], dict[str, Sequence[float]]]:
    """Return latency over exact's by what is wrong and policy, then by who knows."""
    found = {
        (f"{what} as it says", name): {known: by_known[known][name]["latency_over_exact"] for known in KNOWN}
        for what, by_known in values["profile"][fleet].items()
        for name in by_known["told"]
    }
    for name, one in values["slow_down"][fleet].items():
        if name != "exact":
            after = {known: one[f"{known}, over exact after"] for known in KNOWN[1:]}
            found[f"{SLOW_DOWN:g} times slower from the middle on", name] = after
    return found


def _two(interval: Sequence[float]) -> str:
    return spell(interval, ".2f")


def draw(values: Values, figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(14, 7.8)
    (damage, *wrong), (air, *run) = figure.subplots(2, 3)
    names = [name for name in values["gate"]["as it is"] if name != "exact"]
    for place, groups, key, label in (
        (damage, values["gate"], "perplexity_ratio", "perplexity over exact's"),
        (air, values["fading"], "latency_over_exact", "latency over exact's (modelled)"),
    ):
        for number, name in enumerate(names):
            at = [k + 0.12 * (number - (len(names) - 1) / 2) for k in range(len(groups))]
            ones = [one[name] for one in groups.values()]
            # In a simulated cell nothing is answered.
            good = [key == "perplexity_ratio" and reaches_bar(one) for one in ones]
            marked_bars(place, at, [one[key] for one in ones], good, colour_of(name), name, ls="none")
        place.set_xticks(range(len(groups)), [what.replace(" ", "\n", 1) for what in groups], fontsize=8)
        place.axhline(1, color="#bbbbbb", lw=0.8)
        place.set_ylabel(label)
    damage.axhline(TESTBED.bars.perplexity_ratio, color="#117733", ls="--", lw=1, label="bar of perplexity")
    damage.set_title("gate")
    air.set_title("fading (quality not measured here)")
    cases = [(what, known) for what in TAKES for known in KNOWN]
    for place, (fleet, found) in zip(wrong, values["profile"].items(), strict=True):
        knowing = list(found[cases[0][0]]["told"])
        for number, name in enumerate(knowing):
            at = [k + 0.16 * (number - (len(knowing) - 1) / 2) for k in range(len(cases))]
            ones = [found[what][known][name] for what, known in cases]
            points = [one["latency_over_exact"] for one in ones]
            marked_bars(place, at, points, list(map(reaches_bar, ones)), colour_of(name), name, ls="none")
        place.set_xticks(range(len(cases)), [f"{what}\n{known}" for what, known in cases], fontsize=7, rotation=30)
        place.set_title(f"{fleet}: slowest device not as it says")
        place.set_ylabel("latency over exact's (modelled)")
    for place, (fleet, by_name) in zip(run, values["slow_down"].items(), strict=True):
        for name, one in by_name.items():
            # Wide and pale below, dotted above: where correcting changes nothing, both are seen.
            place.plot(one["corrected"], "-", color=colour_of(name), lw=4, alpha=0.35)
            place.plot(one["not corrected"], ":", color=colour_of(name), lw=1.6)
        place.axvline(len(by_name["exact"]["corrected"]) // 2 - 0.5, color="#bbbbbb", lw=0.8)
        place.set(
            xlabel="window", ylabel="ms (modelled)", ylim=(0, None), title=f"{fleet}: slowest device slows down"
        )  # fmt: skip
        place.plot([], [], "-", color="#555555", lw=4, alpha=0.35, label="profiles corrected live")
        place.plot([], [], ":", color="#555555", lw=1.6, label="not corrected")
        place.legend(fontsize=8, loc="lower left")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    exact = Line2D([], [], color=colour_of("exact"), lw=4, alpha=0.35, label="exact")
    handles = [*damage.get_legend_handles_labels()[0], exact, hollow(MISSES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)


main = experiment("When things are not as they are said to be", measure, finding, draw)

if __name__ == "__main__":
    main()
