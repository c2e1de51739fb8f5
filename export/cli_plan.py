"""`wdmoe-bs plan`. It stands here, as it begins with a model's config; `bs/cli.py` lists it by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from wdmoe.profiles.base_station import station_names
from wdmoe.profiles.link_profile import RADIO_EXAMPLE, link_names
from wdmoe.profiles.modelled import hardware_names
from wdmoe.runtime.errors import WdmoeError

if TYPE_CHECKING:
    from wdmoe.export.forecasting import Channel
    from wdmoe.runtime.manifest import Precision

_EPILOG = """\b
Example:
  wdmoe-bs plan --model mixtral --devices 2xagx-orin-64gb,orin-nx-16gb
      --link wifi-5ghz-near --precision int8
"""


@click.command(epilog=_EPILOG)
@click.option("--model", required=True, help="As wdmoe-export takes it; its config is enough.")
@click.option(
    "--devices",
    required=True,
    metavar="NAME,...",
    help=f"Modelled devices, such as 2xorin-nano-8gb: {', '.join(hardware_names())}.",
)
@click.option(
    "--link",
    "links",
    default="wifi-5ghz-mid",
    metavar="NAME[,...]",
    help=f"One for all devices, or one each: {', '.join(link_names())}, or as {RADIO_EXAMPLE}.",
)
@click.option("--precision", type=click.Choice(["fp16", "int8", "int4"]), default="fp16", help="Of the experts.")
@click.option("--bs", default="laptop-8-core", help=f"Modelled base station: {', '.join(station_names())}.")
@click.option(
    "--experts-per-device",
    type=click.IntRange(min=1),
    metavar="N",
    help="By default balanced by speed, as memory allows.",
)
@click.option(
    "--channel", type=click.Choice(["shared", "orthogonal"]), default="shared",
    help="Whether the devices share one channel or each has its own.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the source of each figure.")
def plan(
    model: str,
    devices: str,
    links: str,
    precision: Precision,
    bs: str,
    experts_per_device: int | None,
    channel: Channel,
    as_json: bool,
) -> None:
    """Say what would fit where and how fast it would be, before anything is bought or copied.

    From the model's config and modelled profiles alone: seconds a question, tokens per second, and what they are
    spent with. Nothing of it is measured.
    """
    from rich.console import Console

    from wdmoe.export.forecasting import forecast, forecast_table, read_devices
    from wdmoe.export.published import layout_from_config

    try:
        names = read_devices(devices)
        layout, _, origin = layout_from_config(model, report=lambda text: click.echo(text, err=True))
        found = forecast(layout, origin, names, links.split(","), precision, bs, experts_per_device, channel)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
    else:
        Console().print(forecast_table(found))
