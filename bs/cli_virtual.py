"""The options of a run in virtual time, and the station that they open."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wdmoe.bs.cli_common import say
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.profiles.base_station import station_names
from wdmoe.profiles.link_profile import RADIO_EXAMPLE, link_names
from wdmoe.profiles.modelled import PRECISIONS, ExpertShape, hardware_names

if TYPE_CHECKING:
    from wdmoe.bs.station import Station

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
VIRTUAL_OPTIONS = (
    "devices",
    "links",
    "channel",
    "bandwidth",
    "cost_shape",
    "cost_precision",
    "stage_ms",
    "seed",
    "bs_machine",
)


def read_list(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Read words that are separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def read_shape(context: click.Context, parameter: click.Parameter, text: str | None) -> ExpertShape | None:
    """Read a shape such as 4096x14336."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a shape; expected d_model x d_ff, such as 4096x14336")
    return ExpertShape(int(found[1]), int(found[2]))


def device_options(function: AnyFunction, seed: bool = True) -> AnyFunction:
    """Add --devices, --link, --channel, --bandwidth, --cost-shape, --cost-precision, --stage-ms and, but where it is told, --seed."""
    options = (
        click.option(
            "--devices",
            callback=read_list,
            metavar="NAME,...",
            help=f"Modelled devices, in the order of the device folders: {', '.join(hardware_names())}.",
        ),
        click.option(
            "--link",
            "links",
            callback=read_list,
            metavar="LINK,...",
            help=f"Modelled links, one for all or one each: {', '.join(link_names())}, or {RADIO_EXAMPLE}. In real time: "
            "what the devices' real links carry, in the order of their names; without it, requests tell.",
        ),
        click.option(
            "--channel",
            type=click.Choice(["shared", "orthogonal"]),
            metavar="KIND",
            help="shared: one half-duplex channel for all; orthogonal: a share of the bandwidth for each device.  "
            "[default: shared; in real time as emulated devices say, else orthogonal]",
        ),
        click.option(
            "--bandwidth",
            metavar="HOW",
            help="How orthogonal shares are divided: uniform; static, once for all blocks by how often each expert is used "
            "(--bs-counts); numbers like 0.2,0.3,0.5; or per-block: anew for each block, so that all finish "
            "together. In real time senders keep to it by pacing.  [default: uniform; in real time nothing is divided]",
        ),
        click.option(
            "--cost-shape",
            metavar="DxF",
            callback=read_shape,
            help="Charge time and bytes as if experts were of this shape, such as 4096x14336.",
        ),
        click.option(
            "--cost-precision",
            type=click.Choice(PRECISIONS),
            metavar="P",
            help=f"In this precision: {', '.join(PRECISIONS)}.",
        ),
        click.option(
            "--stage-ms", type=float, help="What a stage of the base station is declared to take.  [default: 1.0]"
        ),
        *([click.option("--seed", type=int, help="Of the links' jitter.  [default: 0]")] if seed else []),
    )
    for option in reversed(options):
        function = option(function)
    return function


def virtual_options(function: AnyFunction, seed: bool = True) -> AnyFunction:
    """Add --clock and what belongs to a virtual one; without --seed, the links' jitter is always the same."""
    clock = click.option(
        "--clock",
        type=click.Choice(["real", "virtual"]),
        default="real",
        help="virtual: run the bundle's devices in this process, and let them and their links take the time of models.",
    )
    machine = click.option(
        "--bs-machine",
        metavar="NAME",
        help=f"Modelled base station that --bs-experts run on: {', '.join(station_names())}.  [default: laptop-8-core]",
    )
    return clock(device_options(machine(function), seed))


def read_virtual(clock: str, options: dict[str, Any]) -> VirtualConfig | None:
    """Take what belongs to a virtual clock out of a command's options.

    Raises:
        ValueError: something is missing, contradicts the rest, or belongs to the other clock.
    """
    given = {name: value for name in VIRTUAL_OPTIONS if (value := options.pop(name, None)) is not None}
    if clock == "real":
        options.update((name, given.pop(name)) for name in ("links", "channel", "bandwidth") if name in given)
        if given:
            option = next(iter(given)).replace("_", "-").replace("links", "link")
            raise ValueError(f"--{option} is for modelled devices; give --clock virtual as well")
        return None
    if missing := [name for name in ("devices", "links") if name not in given]:
        option = missing[0].replace("links", "link")
        raise ValueError(f"--clock virtual needs --{option}; see --help for what there is")
    return VirtualConfig(**given)


def open_any_station(config: StationConfig, virtual: VirtualConfig | None) -> AbstractContextManager[Station]:
    """Open a station over devices that dial in, or in virtual time."""
    static = (config if virtual is None else virtual).bandwidth == "static"
    if config.bs_counts is not None and config.bs_experts == "none" and not static:
        raise ValueError(
            "--bs-counts is for --bs-experts or --bandwidth static; give one of them as well, or leave it out"
        )
    if virtual is None:
        from wdmoe.bs.station import open_station

        return open_station(config, say)
    from wdmoe.bs.virtual import open_virtual_station

    if config.health is not None or config.encrypt:
        raise ValueError("--health and --encrypt are for devices that dial in; leave them out with --clock virtual")
    if config.stages_on != "cpu":
        raise ValueError(
            "--stages-on is for real time; leave it out with --clock virtual, where --stage-ms says it all"
        )
    if config.stage_workers != 1:
        raise ValueError("--stage-workers is for real time; leave it out with --clock virtual, which has one")
    return open_virtual_station(config, virtual, say)
