"""The command `wdmoe-bs`."""

from __future__ import annotations

import importlib

import click

from wdmoe.bs.cli_calibrate import calibrate
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
  wdmoe-bs plan --model mixtral --devices 4xagx-orin-32gb --link wifi-6-near
"""


# Commands that stand elsewhere, as engines do: name -> where it is; imported when it is asked for. Planning begins with a
# model's config, which only the exporter reads.
_ELSEWHERE = {"plan": "wdmoe.export.cli_plan:plan"}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _ELSEWHERE[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"show_default": True})
@click.version_option(package_name="wdmoe")
def main() -> None:
    """Run a Mixture-of-Experts model whose experts live on devices.

    The base station keeps attention, router and head, waits for the devices of its bundle, and decides which
    device works on which token.
    """


for command in (run, quality, calibrate, trace, simulate, generate, devices, status, keygen, enrol):
    main.add_command(command)
