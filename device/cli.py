"""The command `wdmoe-device`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wdmoe.device.cli_checks import build, check
from wdmoe.device.cli_tools import bench, info, profile, read_shape, reported_errors
from wdmoe.device.config import DeviceConfig
from wdmoe.profiles.link_profile import link_names
from wdmoe.profiles.modelled import PRECISIONS, hardware_names
from wdmoe.runtime.engines import ENGINES

_DEFAULTS = DeviceConfig()
_EPILOG = """\b
Examples:
  wdmoe-device                                              # all devices of ./bundle, BS on this machine
  wdmoe-device --bundle wdmoe/ --bs tcp://10.0.0.1:5555     # one device folder, on a Jetson
  wdmoe-device --bundle wdmoe/ --bs tcp://10.0.0.1:5555 --enrol wdmoe1.XXXX      # the first time
  wdmoe-device build --bundle wdmoe/                        # its engines, once; serving does it as well
  wdmoe-device check --bundle wdmoe/                        # which engines give right answers here
  wdmoe-device info                                         # what this machine is and what is missing on it
  wdmoe-device bench --bundle wdmoe/ --json here.json       # its full latency profile
  wdmoe-device --emulate orin-nano-8gb --link wifi-5ghz --cost-shape 4096x14336  # as slow as that, on a laptop
"""


@click.group(invoke_without_command=True, epilog=_EPILOG, context_settings={"show_default": True})
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default=_DEFAULTS.bundle,
    help="A folder device-K made by wdmoe-export; or a whole bundle: then each of its devices gets a process.",
)
@click.option("--bs", default=_DEFAULTS.bs, help="Address of the base station.")
@click.option("--name", default=None, help="Name of this device.  [default: the folder's device-K]")
@click.option(
    "--engine",
    type=click.Choice(["auto", *ENGINES]),
    default=_DEFAULTS.engine,
    help="What runs the experts; auto takes the best that passes its self-check.",
)
@click.option("--threads", type=click.IntRange(min=1), default=_DEFAULTS.threads, help="Threads of the engine.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What `wdmoe-device bench --json` measured of this folder here.  [default: a short measurement at the start]",
)
@click.option("--enrol", metavar="TOKEN", help="On the first start: the token of `wdmoe-bs enrol NAME`; spent once.")
@click.option("--insecure", is_flag=True, help="Do not encrypt although the base station is on the network.")
@click.option("--encrypt", is_flag=True, help="Encrypt although the base station is on this machine.")
@click.option("--keys", type=click.Path(path_type=Path), default=_DEFAULTS.keys, help="Folder of this device's keys.")
@click.option("--emulate", type=click.Choice(hardware_names()), help="Answer as late as this modelled device would.")
@click.option("--link", metavar="LINK", help=f"With --emulate: and over this modelled link: {', '.join(link_names())}.")
@click.option("--seed", type=int, default=_DEFAULTS.seed, help="With --emulate: of the link's jitter.")
@click.option(
    "--cost-shape",
    metavar="DxF",
    callback=read_shape,
    help="With --emulate: charge time and bytes as if experts were of this shape, such as 4096x14336.",
)
@click.option("--cost-precision", type=click.Choice(PRECISIONS), help="With --emulate: and in this precision.")
@click.option(
    "--channel",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --link over WiFi: devices that are given the same file share one radio channel.  "
    "[default: one for all devices of a whole bundle]",
)
@click.version_option(package_name="wdmoe")
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Serve the experts of a bundle to a base station.

    Verifies the folder, builds what its engine needs, checks it against the golden outputs, measures a latency
    profile, then dials the base station and serves until Ctrl-C. Reconnects by itself.
    """
    if context.invoked_subcommand is not None:
        given = [n for n in options if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
        if given:
            option = given[0].replace("_", "-")
            raise click.UsageError(f"--{option} does not go before the command {context.invoked_subcommand}")
        return
    with reported_errors():
        from wdmoe.device.main import run

        code = run(DeviceConfig(**options))
    raise SystemExit(code)


main.add_command(bench)
main.add_command(build)
main.add_command(check)
main.add_command(info)
main.add_command(profile)
