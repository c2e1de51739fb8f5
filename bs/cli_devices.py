"""`wdmoe-bs devices`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from wdmoe.bs.cli_common import print_table, reported_errors, say, station_options
from wdmoe.bs.config import StationConfig


@click.command()
@station_options
@click.option("--wait", "wait_s", type=float, default=5.0, help="Seconds to wait for devices.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--revoke", metavar="NAME", help="Take a device off the roster instead; a running wdmoe-bs drops it.")
def devices(wait_s: float, as_json: bool, revoke: str | None, **station: Any) -> None:
    """Show who is connected, with what, and how fast. Exit code 1 if experts are missing."""
    if revoke is not None:
        _revoke(revoke, station["keys"])
        return
    with reported_errors():
        from wdmoe.bs.results import describe_device
        from wdmoe.bs.station import open_hub
        from wdmoe.bs.tables import device_table
        from wdmoe.runtime.errors import DevicesMissing

        with open_hub(StationConfig(wait_s=wait_s, **station), say) as (_, _, hub):
            try:
                hub.wait_for_devices(wait_s)
            except DevicesMissing as error:
                say(str(error))
            known, missing = [describe_device(hub, name) for name in sorted(hub.devices)], hub.missing_devices()
        if as_json:
            click.echo(json.dumps({"devices": known, "missing": missing}, indent=1))
        else:
            print_table(device_table(known, missing))
    if missing:
        raise SystemExit(1)


def _revoke(name: str, keys: Path) -> None:
    with reported_errors():
        from wdmoe.bs.roster import ROSTER_NAME, FileRoster

        roster = FileRoster(keys / ROSTER_NAME)
        if not roster.revoke(name):
            known = ", ".join(sorted(roster.book().devices)) or "none"
            raise ValueError(f"no device {name} on the roster {roster.path}; enrolled: {known}")
        say(f"{name} is revoked: its key is refused from now on, also by a wdmoe-bs that is running")
