"""`wdmoe-bs keygen` and `wdmoe-bs enrol`: who may connect."""

from __future__ import annotations

import re
from pathlib import Path

import click

from wdmoe.bs.cli_common import keys_option, reported_errors, say


@click.command()
@keys_option()
def keygen(keys: Path) -> None:
    """Make the key of this base station; once. Devices are enrolled for this key."""
    with reported_errors():
        from wdmoe.bs.roster import BS_KEY_NAME
        from wdmoe.runtime.keys import make_key

        made = make_key(keys / BS_KEY_NAME)
        say(f"wrote {keys / BS_KEY_NAME}; only you can read it, keep it so")
        click.echo(made.public)


@click.command(epilog="Example: wdmoe-bs enrol device-0")
@click.argument("name")
@click.option("--hours", type=float, default=24.0, show_default=True, help="How long the token can be spent.")
@keys_option()
def enrol(name: str, hours: float, keys: Path) -> None:
    """Print a token that lets the device NAME enrol, once."""
    with reported_errors():
        from wdmoe.bs.roster import BS_KEY_NAME, ROSTER_NAME, FileRoster
        from wdmoe.runtime.keys import read_key
        from wdmoe.runtime.messages import NAME_PATTERN

        if not re.match(NAME_PATTERN, name):
            raise ValueError(f"{name!r} cannot be a name, expected 1 to 64 letters, digits, dots, dashes, underscores")
        token = FileRoster(keys / ROSTER_NAME).invite(name, read_key(keys / BS_KEY_NAME).public, hours)
        say(
            f"on {name}, while wdmoe-bs is listening: wdmoe-device --bundle FOLDER --bs tcp://THIS-HOST:5555 --enrol TOKEN"
        )
        click.echo(token.encode())
