"""`wdmoe-bs simulate`."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wdmoe.bs.cli_common import (
    check_policies,
    command_line,
    json_option,
    parse_policies,
    print_table,
    progress_bars,
    reported_errors,
    say,
    write_json,
)
from wdmoe.bs.cli_virtual import read_list, read_shape
from wdmoe.profiles.link_profile import RADIO_EXAMPLE, link_names
from wdmoe.profiles.modelled import PRECISIONS, ExpertShape, hardware_names
from wdmoe.runtime.outputs import NewFile

if TYPE_CHECKING:
    from wdmoe.bs.simulation import Site
    from wdmoe.bs.trace import Trace

_MOST_DEVICES = 10_000
_STATIC_QUESTIONS = 20  # of the trace, whose exact loads a static division of the band is fitted to


@click.command()
@click.option(
    "--trace", "trace_path", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Of wdmoe-bs trace."
)
@click.option(
    "--devices",
    callback=read_list,
    required=True,
    metavar="NAME[*N],...",
    help=f"Modelled devices, N of each: {', '.join(hardware_names())}.",
)
@click.option(
    "--link",
    "links",
    callback=read_list,
    metavar="LINK,...",
    help=f"Modelled links, one for all or one each: {', '.join(link_names())}, or {RADIO_EXAMPLE}.",
)
@click.option(
    "--radio",
    metavar="KEY=VALUE,...",
    help="Instead of --link: a cell with path loss, fading and movement, such as far_m=200,fading=false,speed=1.5.  "
    "[default: 50 to 400 m, 3.5 GHz, 100 MHz, Rayleigh fading, at rest]",
)
@click.option("--channel", type=click.Choice(["shared", "orthogonal"]), default="shared", help="As for wdmoe-bs run.")
@click.option(
    "--bandwidth",
    type=click.Choice(["uniform", "static", "per-block"]),
    default="uniform",
    help="How orthogonal shares are divided: alike, once for all blocks (needs SciPy), or anew for each block.",
)
@click.option(
    "--policy", "policies", multiple=True, default=("exact", "wlr"), help="As for wdmoe-bs run; auto: bottleneck."
)
@click.option("--replicas", type=click.IntRange(min=1), default=1, help="Devices that hold each expert, at least.")
@click.option("--questions", type=click.IntRange(min=1), help="Only the first ones of the trace.")
@click.option("--cost-shape", callback=read_shape, default="4096x14336", metavar="DxF", help="Of an expert.")
@click.option("--cost-precision", type=click.Choice(PRECISIONS), default="int4", metavar="P", help="Of its weights.")
@click.option("--stage-ms", type=click.FloatRange(min=0), default=1.0, help="Of the base station.")
@click.option("--seed", type=int, default=0, help="Of places, fading and movement; the same for every policy.")
@click.option("--plot", type=NewFile(), help="Draw latencies and the Pareto front.")
@json_option
def simulate(
    trace_path: Path, policies: tuple[str, ...], json_path: Path | None, plot: Path | None, **options: Any
) -> None:
    """Run policies over a recorded trace, on 1 to 10,000 modelled devices: one question after another.

    The decision functions and the latency model are those of a live run. Nothing that comes out is measured, and what a
    policy does to answers is not known: only how much it leaves out.
    """
    with reported_errors():
        from wdmoe.bs.plots import require_format
        from wdmoe.bs.simulation import simulate as run_simulation
        from wdmoe.bs.tables import simulation_table
        from wdmoe.bs.trace import read_trace

        check_policies(policies)
        if plot is not None:
            require_format("--plot", plot)
        trace = read_trace(trace_path)
        chosen = {policy.describe(): policy for policy in parse_policies(policies, trace)}
        questions = range(min(options.pop("questions") or trace.n_questions, trace.n_questions))
        results = []
        site, described = _build_site(trace, **options)
        with progress_bars({name: len(questions) for name in chosen}) as on_question:
            for name, policy in chosen.items():

                def answered(name: str = name) -> None:
                    on_question(name)

                site, described = _build_site(trace, **options)  # a cell anew: the same fading for every policy
                results.append(run_simulation(trace, site, policy, questions, answered).summary())
        result = {
            "format": "wdmoe-simulation",
            "version": 1,
            "origin": "modelled: devices and links from profiles, routing from a trace; nothing here was measured",
            "wdmoe": version("wdmoe"),
            "command": command_line(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": {"name": trace.info.model, "bundle_id": trace.info.bundle_id, "datasets": trace.info.datasets},
            **described,
            "results": results,
        }
        if plot is not None:
            from wdmoe.bs.simulation_plots import draw_simulation

            draw_simulation(result, plot)
            say(f"wrote {plot}")
        if json_path is not None:
            write_json(json_path, result)
        if json_path is None or str(json_path) != "-":
            print_table(simulation_table(result))


def _build_site(
    trace: Trace,
    devices: tuple[str, ...],
    links: tuple[str, ...] | None,
    radio: str | None,
    channel: str,
    bandwidth: str,
    replicas: int,
    cost_shape: ExpertShape,
    cost_precision: str,
    stage_ms: float,
    seed: int,
) -> tuple[Site, dict[str, Any]]:
    """Make the devices and their medium, and say what they are."""
    from dataclasses import asdict, replace

    import numpy as np

    from wdmoe.bs.airtime import latency_model
    from wdmoe.bs.latency import DeviceLatency
    from wdmoe.bs.radio import Cell, parse_radio
    from wdmoe.bs.simulation import Site, block_loads, holders_of, spread, static_shares
    from wdmoe.profiles.link_profile import modelled_link
    from wdmoe.profiles.modelled import modelled_profile

    if links is not None and radio is not None:
        raise ValueError("--link and --radio contradict each other")
    names = _counted(devices)
    curves = {name: modelled_profile(name, cost_precision, cost_shape).curve() for name in dict.fromkeys(names)}
    row_bytes = 2 * cost_shape.d_model
    longest = int(np.diff(trace.starts).max())
    cell = None
    if links is None:
        cell = Cell(parse_radio(radio or ""), len(names), seed)
        latencies = [DeviceLatency(curves[name], cell.config.rtt_ms) for name in names]
        model = latency_model(latencies, longest)
        # What a static division is fitted to: rates without fading, of where the devices are at first.
        still = Cell(replace(cell.config, fading=False), len(names), seed)
        down, up = (8e-3 * row_bytes / (rate * cell.config.mhz) for rate in still.efficiencies())
        model = model.with_rates(down, up)
    else:
        profiles = [modelled_link(link) for link in links]
        if len(profiles) not in (1, len(names)):
            raise ValueError(f"{len(profiles)} links for {len(names)} devices; give one for all, or one each")
        profiles = profiles * len(names) if len(profiles) == 1 else profiles
        model = latency_model(
            [DeviceLatency(curves[name], link.round_trip_ms) for name, link in zip(names, profiles, strict=True)],
            longest,
        ).with_rates(
            np.array([link.down_ms(row_bytes) for link in profiles]),
            np.array([link.up_ms(row_bytes) for link in profiles]),
        )
    recorded = int(trace.placement.max()) + 1
    if len(names) == recorded and replicas == 1:
        holders = holders_of(trace.placement)
    else:
        holders = spread(trace.n_blocks, trace.n_experts, len(names), replicas)
    site = Site(model, holders, "shared", None, stage_ms, cell, 8.0 * row_bytes)
    if channel == "orthogonal":
        shares = None
        if bandwidth == "static":
            fitted = range(min(_STATIC_QUESTIONS, trace.n_questions))
            shares = static_shares(*block_loads(trace, site, fitted))
        site = replace(site, bandwidth=bandwidth, shares=shares)  # type: ignore[arg-type]
    elif bandwidth != "uniform":
        raise ValueError("--bandwidth divides orthogonal shares; give --channel orthogonal as well")
    return site, {
        "devices": dict(Counter(names)),
        "experts_per_device": [int(site.holders[0].sum(axis=0).min()), int(site.holders[0].sum(axis=0).max())],
        "replicas": replicas,
        "charged": {"shape": f"{cost_shape.d_model}x{cost_shape.d_ff}", "precision": cost_precision},
        "links": None if links is None else list(links),
        "radio": None if cell is None else asdict(cell.config),
        "channel": channel,
        "bandwidth": bandwidth if channel == "orthogonal" else None,
        "shares": None if site.shares is None else site.shares.tolist(),
        "stage_ms": stage_ms,
        "seed": seed,
    }


def _counted(devices: tuple[str, ...]) -> list[str]:
    names: list[str] = []
    for item in devices:
        name, _, count = item.partition("*")
        if count and not (count.isdecimal() and int(count) > 0):
            raise ValueError(f"--devices: {item!r} is not NAME or NAME*N")
        names += [name] * int(count or 1)
        if len(names) > _MOST_DEVICES:
            raise ValueError(f"--devices: more than {_MOST_DEVICES:,} devices")
    return names
