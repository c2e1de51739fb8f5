"""What stands beside every result of a benchmark: on what it was measured, with what, and how."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from wdmoe.device.loading import hardware_name


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Say on what, with which versions and how a script runs; `load_average` tells of others on the machine."""
    return {
        "hardware": hardware_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("wdmoe", *packages)},
        "load_average": os.getloadavg(),  # 1, 5 and 15 minutes
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(target: str, result: dict[str, Any]) -> None:
    """Write a result to a file, or with - to stdout."""
    text = json.dumps(result, indent=2) + "\n"
    if target == "-":
        click.echo(text, nl=False)
    else:
        Path(target).write_text(text)


def progress(line: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    click.echo(line, err=True)
