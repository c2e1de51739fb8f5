"""Profiles and machines as a person sees them on the terminal: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from wdmoe.device.info import Library, advice
from wdmoe.profiles.device_profile import DeviceProfile
from wdmoe.runtime.outputs import written_whole

_MARKERS = "osD^vPX*"  # of curves in a plot
Named = tuple[str, DeviceProfile]  # the file's name


def profile_table(name: str, profile: DeviceProfile) -> Group:
    """Show one profile."""
    table = _table("tokens", "p50 ms", "p95 ms", "us/token", "cold p50", "staging")
    cold = {point.tokens: point.p50_ms for point in profile.cold}
    staging = {p.tokens: p.convert_ms + p.gather_ms + p.weight_ms + p.sum_ms for p in profile.staging}
    for point in profile.points:
        table.add_row(
            str(point.tokens),
            f"{point.p50_ms:.3f}",
            f"{point.p95_ms:.3f}",
            f"{1e3 * point.p50_ms / point.tokens:.1f}",
            *(f"{values[point.tokens]:.3f}" if point.tokens in values else "-" for values in (cold, staging)),
        )
    notes = list(_facts(profile).values())
    if profile.staging:
        notes.append("staging: convert, gather, weight and sum of a request, ms, beside its expert calls")
    notes += profile.sources
    return Group(Text(f"{name}: {profile.origin}", style="italic"), table, Text("\n".join(notes), style="dim"))


def difference_table(profiles: Sequence[Named]) -> Group:
    """Show profiles side by side; each but the first with its ratio to the first, read off its curve."""
    (first_name, first), others = profiles[0], profiles[1:]
    table = _table("tokens", "1 ms", *(f"{n} {what}" for n in range(2, len(profiles) + 1) for what in ("ms", "x")))
    counts = sorted({point.tokens for _, profile in profiles for point in profile.points})
    for tokens in counts:
        base_ms = first.call_ms(tokens)
        cells = [f"{base_ms:.3f}"]
        for _, profile in others:
            cells += [f"{profile.call_ms(tokens):.3f}", f"{profile.call_ms(tokens) / base_ms:.2f}"]
        table.add_row(str(tokens), *cells)
    lines = [f"{number}: {name}, {profile.origin}" for number, (name, profile) in enumerate(profiles, start=1)]
    facts = [_facts(profile) for _, profile in profiles]
    for key in facts[0]:
        if len({fact[key] for fact in facts}) > 1:
            lines += [f"{number}: {fact[key]}" for number, fact in enumerate(facts, start=1)]
    title = f"p50 of an expert call; x: over that of {first_name}"
    return Group(Text(title, style="italic"), table, Text("\n".join(lines), style="dim"))


def machine_table(found: dict[str, Any], libraries: Sequence[Library]) -> Group:
    """Show what a machine is, and what can run experts on it."""
    table = Table.grid(padding=(0, 2))
    memory, clocks = found["memory_bytes"], found["clocks_mhz"]
    shown = {
        "hardware": found["hardware"],
        "processor": f"{found['processor'] or 'not named'}, {found['cpus'] or '?'} CPUs",
        "gpu": _gpu(found["gpu"], found["onnxruntime_cuda"]),
        "memory": f"{memory / 1e9:.1f} GB, {(found['available_bytes'] or 0) / 1e9:.1f} free" if memory else "not said",
        "system": f"L4T {found['l4t']}, JetPack {found['jetpack'] or 'unknown'}" if found["l4t"] else "not a Jetson",
        "python": found["python"],
        "power mode": found["power_mode"] or "not said",
        "clocks held": {True: "yes", False: "no", None: "not said"}[found["jetson_clocks"]],
        "clocks now": ", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in clocks.items()) or "not said",
        "throttled": "; ".join(found["throttled"]) or "nothing noticed",
    }
    for key, value in shown.items():
        table.add_row(key, value)
    lines: list[str] = []
    for library in libraries:
        state = library.version or f"missing ({library.problem})"
        lines.append(f"{library.name} {state}: {library.purpose}")
        lines += [f"    {line}" for line in library.install]
    return Group(table, Text(), Text("\n".join([*lines, *advice(found)])))


def _gpu(gpu: dict[str, Any] | None, has_cuda: bool | None) -> str:
    if gpu is None:
        return "none that a CUDA driver knows"
    provider = {True: "has a CUDA provider", False: "has no CUDA provider", None: "is missing"}[has_cuda]
    return (
        f"{gpu['name']}, compute capability {gpu['sm']}, {gpu['memory_bytes'] / 1e9:.1f} GB, driver for CUDA "
        f"{gpu['driver']}; ONNX Runtime {provider}"
    )


def plot_profiles(profiles: Sequence[Named], out: Path) -> None:
    """Draw profiles into an image.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the ending of the image is of no known format.
        OutputError: the image cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5 + 0.2 * len(profiles)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, profile) in enumerate(profiles):
        curve = profile.curve()
        label = f"{name} ({profile.origin})"
        axes.plot([n for n, _ in curve], [ms for _, ms in curve], marker=_MARKERS[number % len(_MARKERS)], label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a call", ylabel="p50 of an expert call, ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # 100 rather than a power of ten
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.grid(alpha=0.25)
    for text in figure.legend(loc="outside lower left", frameon=False).get_texts():
        text.set_parse_math(False)  # a file may have a dollar in its name
    with written_whole(out) as partial:
        figure.savefig(partial, dpi=140, format=out.suffix[1:] or "png")


def _facts(profile: DeviceProfile) -> dict[str, str]:
    """Say what a profile is of, line by line."""
    facts = {
        "device": profile.device,
        "software": profile.software,
        "expert": f"{profile.d_model}x{profile.d_ff} {profile.precision}, engine {profile.engine}",
        "conditions": "conditions: not recorded",
    }
    if (said := profile.conditions) is not None:
        held = {True: "clocks held", False: "clocks follow the load", None: "clocks: not said"}[said.jetson_clocks]
        clocks = "".join(f", {name} {mhz:.0f} MHz" for name, mhz in said.clocks_mhz.items())
        sizes = (("process", said.rss_bytes), ("weights", said.weights_bytes))
        memory = "".join(f", {name} {size / 1e6:.0f} MB" for name, size in sizes if size is not None)
        load = f", load average {said.load_average:.1f}" if said.load_average is not None else ""
        throttled = "; ".join(said.throttled) or "no throttling noticed"
        facts["conditions"] = f"power mode {said.power_mode or 'not said'}, {held}{clocks}{memory}{load}; {throttled}"
    return facts


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
