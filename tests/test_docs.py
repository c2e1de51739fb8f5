"""What the pages tell people to type exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/devices.md", "docs/jetson.md")
MODULES = {"wdmoe-bs": "wdmoe.bs.cli", "wdmoe-device": "wdmoe.device.cli", "wdmoe-export": "wdmoe.export.cli"}
COMMAND = re.compile(r"(wdmoe-(?:bs|device|export))((?: +[^ \n`|#;&)]+)*)")


def unknown(name: str, words: list[str]) -> list[str]:
    """Return the options and subcommands of a command line that the command does not have."""
    command: click.Command = importlib.import_module(MODULES[name]).main
    known = command.params
    missing: list[str] = []
    for word in words:
        option = word.strip("[]'\"(),.").partition("=")[0]
        if isinstance(command, click.Group) and not option.startswith("-"):
            command = command.get_command(click.Context(command), option) or command
            known = command.params
            continue
        has = any(option in (*parameter.opts, *parameter.secondary_opts) for parameter in known)
        if option.startswith("--") and option != "--help" and not has:
            missing.append(option)
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    found = [
        (match[1], match[2].split())
        for match in COMMAND.finditer(text)
        if match[2].strip() and not match[2].startswith("-")
    ]
    assert found
    wrong = {f"{name} {' '.join(words)}": gone for name, words in found if (gone := unknown(name, words))}
    assert not wrong


def test_an_option_that_does_not_exist_is_noticed() -> None:
    assert unknown("wdmoe-device", ["--bundle", "wdmoe/", "--no-such", "1"]) == ["--no-such"]
    assert unknown("wdmoe-device", ["profile", "model", "--device", "x", "--bundle", "y"]) == ["--bundle"]
    assert unknown("wdmoe-bs", ["enrol", "device-0", "--hours", "3"]) == []
