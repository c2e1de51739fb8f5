"""The command `wdmoe-bs`."""

from __future__ import annotations

import click

from wdmoe.bs.cli_devices import devices
from wdmoe.bs.cli_generate import generate
from wdmoe.bs.cli_keys import enrol, keygen
from wdmoe.bs.cli_quality import quality
from wdmoe.bs.cli_run import run
from wdmoe.bs.cli_simulate import simulate
from wdmoe.bs.cli_status import status
from wdmoe.bs.cli_trace import trace

_EPILOG = """\b
Examples:
  wdmoe-bs run --dataset piqa --data-dir data
  wdmoe-bs run --dataset piqa-sample --policy exact --policy wlr:alpha=0.6
  wdmoe-bs quality --policy wlr --data-dir data
  wdmoe-bs generate --chat "How does bread stay fresh?"
  wdmoe-bs devices
"""


@click.group(epilog=_EPILOG, context_settings={"show_default": True})
@click.version_option(package_name="wdmoe")
def main() -> None:
    """Run a Mixture-of-Experts model whose experts live on devices.

    The base station keeps attention, router and head, waits for the devices of its bundle, and decides which
    device works on which token.
    """


for command in (run, quality, trace, simulate, generate, devices, status, keygen, enrol):
    main.add_command(command)
