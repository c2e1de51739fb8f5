"""The command `wdmoe-device`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wdmoe.device.config import DeviceConfig

_DEFAULTS = DeviceConfig()
_EPILOG = """\b
Examples:
  wdmoe-device                                              # all devices of ./bundle, BS on this machine
  wdmoe-device --bundle wdmoe/ --bs tcp://10.0.0.1:5555     # one device folder, on a Jetson
  wdmoe-device --bundle wdmoe/ --bs tcp://10.0.0.1:5555 --enrol wdmoe1.XXXX      # the first time
"""


@click.command(epilog=_EPILOG, context_settings={"show_default": True})
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
    type=click.Choice(["auto", "onnxruntime", "numpy"]),
    default=_DEFAULTS.engine,
    help="What runs the experts; auto takes the best that passes its self-check.",
)
@click.option("--threads", type=click.IntRange(min=1), default=_DEFAULTS.threads, help="Threads of the engine.")
@click.option("--enrol", metavar="TOKEN", help="On the first start: the token of `wdmoe-bs enrol NAME`; spent once.")
@click.option("--insecure", is_flag=True, help="Do not encrypt although the base station is on the network.")
@click.option("--encrypt", is_flag=True, help="Encrypt although the base station is on this machine.")
@click.option("--keys", type=click.Path(path_type=Path), default=_DEFAULTS.keys, help="Folder of this device's keys.")
@click.version_option(package_name="wdmoe")
def main(**options: Any) -> None:
    """Serve the experts of a bundle to a base station.

    Verifies the folder, checks the engine against the golden outputs, measures a latency profile, then dials
    the base station and serves until Ctrl-C. Reconnects by itself.
    """
    from wdmoe.device.main import run
    from wdmoe.runtime.errors import WdmoeError

    try:
        code = run(DeviceConfig(**options))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    raise SystemExit(code)
