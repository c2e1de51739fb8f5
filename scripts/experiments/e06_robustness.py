"""Experiment 6: what a policy is worth when the gate is noisy, a profile is wrong, channels fade, or a device slows down.

    python scripts/experiments/e06_robustness.py --data-dir DIR --json FILE --plot FILE.png

On the testbed's devices and shared channel in virtual time, at 6:4:2 bit/s/Hz. Gate: the router's logits are divided by a
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
    Settings,
    Values,
    colour_of,
    error_bars,
    experiment,
    progress,
    ratio_of_sums,
    spell,
)
from scripts.experiments._model import TESTBED, bundle, devices, read, trace, windows
from scripts.experiments._more import KNOW_LATENCY, chosen, open_tapped, slower
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


def measure(settings: Settings) -> Values:
    count = 2 if settings.short else WINDOWS
    return {
        "windows": count,
        "gate": gate(settings, count),
        "profile": profiles(settings, count),
        "fading": fading(settings, count),
        "slow_down": slow_down(settings, 4 if settings.short else SLOW_WINDOWS),
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
                "latency_over_exact": ratio_of_sums(reading.latency_ms, exact.latency_ms),
                "perplexity_ratio": reading.perplexity_ratio(exact),
                "gate_mass_dropped": reading.summary.gate_mass_dropped,
                "nats": reading.nats,
            }
            for name, reading in readings.items()
        }
        progress(f"gate, {what}: done")
    return found


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


def profiles(settings: Settings, count: int) -> Values:
    """Read text while the slowest device is not what it says."""
    names = chosen(*KNOW_LATENCY)
    found: Values = {}
    for what, factor in TAKES.items():
        found[what] = {}
        for known in KNOWN:
            with open_tapped(bundle(settings), ARM, lambda device, f=factor: tired(device, f)) as station:  # type: ignore[misc]
                tracker = station.hub.devices[SLOWEST].latency
                if known == "told":
                    tracker.profile = slower(tracker.profile, factor)
                if known != "corrected":
                    stop_correcting(station)
                readings = read(station, names, windows(settings, station, count))
            exact = readings["exact"]
            found[what][known] = {
                name: {
                    "latency_over_exact": ratio_of_sums(readings[name].latency_ms, exact.latency_ms),
                    "perplexity_ratio": readings[name].perplexity_ratio(exact),
                    "latency_ms": readings[name].latency_ms,
                }
                for name in names
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


def slow_down(settings: Settings, count: int) -> Values:
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
            with open_tapped(bundle(settings), ARM, meet) as station:
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
    said = [f"On {values['windows']} windows of text (modelled times, real answers), over exact in the same trouble."]
    plain = values["gate"]["as it is"]
    for name in plain:
        if name == "exact":
            continue
        worst = max(values["gate"], key=lambda what: float(values["gate"][what][name]["perplexity_ratio"][0]))
        then = values["gate"][worst][name]
        said.append(
            f"{name}: perplexity {spell(plain[name]['perplexity_ratio'])} and latency "
            f"{spell(plain[name]['latency_over_exact'], '.2f')} as the gate is, at worst "
            f"{spell(then['perplexity_ratio'])} and {spell(then['latency_over_exact'], '.2f')} with {worst}."
        )
    for what, by_known in values["profile"].items():
        each = [
            f"{name} {', '.join(_two(by_known[known][name]['latency_over_exact']) + ' ' + known for known in KNOWN)}"
            for name in by_known["told"]
        ]
        said.append(f"The slowest device {what} as it says, latency over exact's: {'; '.join(each)}.")
    still, faded = values["fading"]["still"], values["fading"]["fading"]
    each = [
        f"{name} {_two(still[name]['latency_over_exact'])} and {_two(faded[name]['latency_over_exact'])}"
        for name in still
        if name != "exact"
    ]
    slower_by = faded["exact"]["latency_mean_ms"] / still["exact"]["latency_mean_ms"] - 1
    said.append(
        f"Fading changes exact's latency by {100 * slower_by:+.0f} %; over exact's, still and fading: {'; '.join(each)}."
    )
    each = [
        f"{name} {_two(one['corrected, over exact after'])} corrected, {_two(one['not corrected, over exact after'])} not"
        for name, one in values["slow_down"].items()
        if name != "exact"
    ]
    said.append(f"After it has become {SLOW_DOWN:g} times slower, over exact's: {'; '.join(each)}.")
    return " ".join(said)


def _two(interval: Sequence[float]) -> str:
    return spell(interval, ".2f")


def draw(values: Values, figure: Figure) -> None:
    figure.set_size_inches(11, 7.6)
    (damage, wrong), (air, run) = figure.subplots(2, 2)
    names = [name for name in values["gate"]["as it is"] if name != "exact"]
    gates = {"perplexity_ratio": (damage, values["gate"], "gate: perplexity over exact's")}
    for key, (place, groups, title) in {
        **gates, "latency_over_exact": (air, values["fading"], "fading: latency over exact's (modelled)")
    }.items():  # fmt: skip
        for number, name in enumerate(names):
            at = [k + 0.12 * (number - (len(names) - 1) / 2) for k in range(len(groups))]
            error_bars(
                place,
                at,
                [one[name][key] for one in groups.values()],
                color=colour_of(name),
                label=name,
                ls="none",
                ms=4,
            )
        place.set_xticks(range(len(groups)), [what.replace(" ", "\n", 1) for what in groups])
        place.axhline(1, color="#bbbbbb", lw=0.8)
        place.set_title(title)
    figure.legend(*damage.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    cases = [(what, known) for what in TAKES for known in KNOWN]
    knowing = list(values["profile"][cases[0][0]]["told"])
    for number, name in enumerate(knowing):
        at = [k + 0.16 * (number - (len(knowing) - 1) / 2) for k in range(len(cases))]
        points = [values["profile"][what][known][name]["latency_over_exact"] for what, known in cases]
        error_bars(wrong, at, points, color=colour_of(name), label=name, ls="none", ms=4)
    wrong.set_xticks(range(len(cases)), [f"{known}\n{what}" for what, known in cases], fontsize=7, rotation=20)
    wrong.set_title("slowest device not as it says: latency over exact's (modelled)")
    for name, one in values["slow_down"].items():
        for known, style in (("corrected", "-"), ("not corrected", ":")):
            run.plot(one[known], style, color=colour_of(name), label=name if style == "-" else None)
    run.axvline(len(values["slow_down"]["exact"]["corrected"]) // 2 - 0.5, color="#bbbbbb", lw=0.8)
    run.set(
        xlabel="window",
        ylabel="ms (modelled)",
        ylim=(0, None),
        title="slowest device slows down (dotted: not corrected)",
    )
    run.legend(fontsize=7)


main = experiment("When things are not as they are said to be", measure, finding, draw)

if __name__ == "__main__":
    main()
