"""`wdmoe-device bench`, `info` and `profile`: what looks at a device without serving."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wdmoe.device.config import DeviceConfig
from wdmoe.profiles.modelled import PRECISIONS, ExpertShape, hardware_names
from wdmoe.runtime.engines import ENGINES
from wdmoe.runtime.outputs import NewFile, written_whole

if TYPE_CHECKING:
    from wdmoe.device.profile_tables import Named
    from wdmoe.profiles.device_profile import DeviceProfile

_DEFAULTS = DeviceConfig()
_files = click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
_json_option = click.option("--json", "json_path", type=NewFile(), help="Keep the profile; - prints it.")


def read_shape(context: click.Context, parameter: click.Parameter, text: str | None) -> ExpertShape | None:
    """Read a shape such as 4096x14336, for an option."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not D_MODELxD_FF, for example 4096x14336")
    return ExpertShape(int(found[1]), int(found[2]))


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=_DEFAULTS.bundle, help="As for serving.")
@click.option("--engine", type=click.Choice(["auto", *ENGINES]), default=_DEFAULTS.engine)
@click.option("--threads", type=click.IntRange(min=1), default=_DEFAULTS.threads, help="Threads of the engine.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=2.0, help="Spent on each token count.")
@_json_option
def bench(bundle: Path, engine: str, threads: int, seconds: float, json_path: Path | None) -> None:
    """Measure this device: expert calls of 1 to 1024 tokens, warm and cold, and what they were measured under.

    Of a whole bundle the first device folder is taken.
    """
    with reported_errors():
        from wdmoe.device import benching
        from wdmoe.device.loading import choose_engine, engine_names, say_to_stderr
        from wdmoe.device.machine import Machine
        from wdmoe.device.main import device_folders
        from wdmoe.runtime.manifest import DeviceManifest, read_manifest, verify_files

        folder = device_folders(bundle)[0]
        manifest = read_manifest(folder, DeviceManifest)
        say_to_stderr(f"{folder}: {len(manifest.experts)} experts of {manifest.model.name}")
        verify_files(folder, manifest)
        machine = Machine()
        grown = benching.loaded_bytes(machine)
        chosen = choose_engine(folder, manifest, engine_names(engine), threads, say_to_stderr)
        weights_bytes = grown()
        profile = benching.bench(chosen, manifest, machine, say_to_stderr, seconds=seconds, weights_bytes=weights_bytes)
        _report(folder.name, profile, json_path)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show what this machine is, what can run experts on it, what is missing and how to install it."""
    from wdmoe.device.info import advice, describe_machine
    from wdmoe.device.machine import Machine

    found, libraries = describe_machine(Machine())
    if as_json:
        described = {**found, "libraries": [asdict(library) for library in libraries], "advice": advice(found)}
        click.echo(json.dumps(described, indent=1))
    else:
        from wdmoe.device.profile_tables import machine_table

        _print(machine_table(found, libraries))


@click.group()
def profile() -> None:
    """Show, compare, plot and compute latency profiles."""


@profile.command()
@_files
def show(files: tuple[Path, ...]) -> None:
    """Show profiles: the table, what it was measured under, and the sources of what is modelled."""
    with reported_errors():
        from wdmoe.device.profile_tables import profile_table

        for name, shown in _read(files):
            _print(profile_table(name, shown))


@profile.command()
@_files
def diff(files: tuple[Path, ...]) -> None:
    """Compare profiles with the first: times, their ratio, and in what else they differ."""
    with reported_errors():
        from wdmoe.device.profile_tables import difference_table

        if len(files) < 2:
            raise ValueError("give at least two files: the first is what the others are compared with")
        _print(difference_table(_read(files)))


@profile.command()
@_files
@click.option("--out", type=NewFile(), default=Path("profiles.png"), help="The image.")
def plot(files: tuple[Path, ...], out: Path) -> None:
    """Draw profiles into one image; needs matplotlib."""
    with reported_errors():
        from wdmoe.device.profile_tables import plot_profiles

        try:
            plot_profiles(_read(files), out)
        except ImportError as error:
            raise click.ClickException(f"a plot needs matplotlib ({error}): pip install 'wdmoe[plots]'") from error
        click.echo(out)


@profile.command()
@click.option("--device", type=click.Choice(hardware_names()), required=True)
@click.option("--shape", metavar="DxF", callback=read_shape, required=True, help="Of an expert, such as 4096x14336.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp16", help="Of its weights.")
@_json_option
def model(device: str, shape: ExpertShape, precision: str, json_path: Path | None) -> None:
    """Compute the profile of a Jetson module from its published figures: an estimate, labelled `modelled`."""
    with reported_errors():
        from wdmoe.profiles.modelled import modelled_profile

        _report(device, modelled_profile(device, precision, shape), json_path)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn what a user can mend into a message and exit code 1, or 2 for bad options."""
    from wdmoe.runtime.errors import WdmoeError

    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")) from error


def _read(files: tuple[Path, ...]) -> list[Named]:
    from wdmoe.profiles.device_profile import read_profile

    return [(path.name, read_profile(path)) for path in files]


def _report(name: str, made: DeviceProfile, json_path: Path | None) -> None:
    from wdmoe.device.profile_tables import profile_table
    from wdmoe.profiles.device_profile import encode_profile

    if json_path is not None and str(json_path) == "-":
        click.echo(encode_profile(made), nl=False)
        return
    _print(profile_table(name, made))
    if json_path is not None:
        with written_whole(json_path) as partial:
            partial.write_bytes(encode_profile(made))


def _print(what: Any) -> None:
    from rich.console import Console

    Console().print(what, "")
