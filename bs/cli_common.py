"""What the commands of `wdmoe-bs` share: options, how errors are told, where results go."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wdmoe.bs.config import InFlight, StationConfig
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.outputs import NewFile, written_whole

if TYPE_CHECKING:
    from wdmoe.bs.policies import Policy
    from wdmoe.bs.trace import Trace
    from wdmoe.runtime.manifest import BsManifest

DEFAULTS = StationConfig()
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def keys_option() -> Callable[[AnyFunction], AnyFunction]:
    """Make the option --keys."""
    return click.option(
        "--keys", type=click.Path(path_type=Path, file_okay=False), default=DEFAULTS.keys, help="Folder of the keys."
    )


def station_options(function: AnyFunction) -> AnyFunction:
    """Add the options that every command with an open base station takes."""
    return _with_options(
        function,
        click.option(
            "--bundle", type=click.Path(path_type=Path), default=DEFAULTS.bundle, help="The folder `bs` of a bundle."
        ),
        click.option("--listen", default=DEFAULTS.listen, help="Address that devices dial."),
        click.option("--insecure", is_flag=True, help="Do not encrypt although the network can reach the address."),
        click.option("--encrypt", is_flag=True, help="Encrypt although only this machine can reach it."),
        keys_option(),
    )


def model_options(function: AnyFunction) -> AnyFunction:
    """Add the options that every command takes that runs the model over the devices."""
    return _with_options(
        function,
        click.option(
            "--wire",
            type=click.Choice(["fp16", "fp32", "int8"]),
            default=DEFAULTS.wire,
            help="Token rows on the wire; int8: with a scale for each row.",
        ),
        click.option("--threads", type=click.IntRange(min=1), default=DEFAULTS.threads, help="Threads of the stages."),
        click.option(
            "--stages-on",
            type=click.Choice(["cpu", "cuda", "auto"]),
            default=DEFAULTS.stages_on,
            metavar="WHERE",
            help="Where the base station computes: cpu, cuda, or auto, a GPU where there is one and the extra cuda-bs. "
            "Not yet run on a GPU.",
        ),
        click.option("--wait", "wait_s", type=float, default=DEFAULTS.wait_s, help="Seconds to wait for the devices."),
        click.option(
            "--bs-holds",
            default=DEFAULTS.bs_holds,
            metavar="N|all|none",
            help="Experts the base station may load itself when a device is lost; N at a time.",
        ),
        click.option(
            "--bs-experts",
            default=DEFAULTS.bs_experts,
            metavar="N|auto|none",
            help="Experts the base station keeps in memory and runs itself wherever that makes a block shorter, the most "
            "used first; N in all, auto: what fits into half of the free memory.",
        ),
        click.option(
            "--bs-counts",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            help="How often each expert is used: a trace of wdmoe-bs trace, or counts of wdmoe-export calibrate.  "
            "[default: the bundle's]",
        ),
        click.option(
            "--trace",
            type=NewFile(),
            help="Write a timeline there, for https://ui.perfetto.dev: stages, sends, waits, air and devices; with --clock "
            "virtual, where there is one, in virtual time.",
        ),
        click.option("--health", metavar="HOST:PORT", help="Serve /health there, for wdmoe-bs status and monitors."),
        click.option(
            "--split",
            type=click.Choice(["auto", "none"]),
            default=DEFAULTS.split,
            help="Send a long request in pieces where that is sooner: a device computes one while the next is on its way.",
        ),
        click.option(
            "--when-lost",
            type=click.Choice(["fail", "skip"]),
            default=DEFAULTS.when_lost,
            help="What a policy other than exact does when nobody can take over: skip leaves out and counts.",
        ),
    )


def data_dir_option(function: AnyFunction) -> AnyFunction:
    """Add --data-dir."""
    return _with_options(
        function,
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            envvar="WDMOE_DATA_DIR",
            show_envvar=True,
            help="Folder of local rows (DIR/piqa/valid.jsonl); without it the Hugging Face hub is asked.",
        ),
    )


def read_in_flight(context: click.Context, parameter: click.Parameter, text: str) -> InFlight:
    """Read a number of microbatches, or auto."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is no number of microbatches; expected 1 or more, or auto")
    return int(text)


def throughput_options(function: AnyFunction) -> AnyFunction:
    """Add --batch, --in-flight and --stage-workers."""
    return _with_options(
        function,
        click.option(
            "--batch",
            type=click.IntRange(min=1),
            default=DEFAULTS.batch,
            help="Questions in a microbatch: more raises throughput, and the latency of each question.",
        ),
        click.option(
            "--in-flight",
            callback=read_in_flight,
            default=str(DEFAULTS.in_flight),
            metavar="N|auto",
            help="Microbatches at a time: more raises throughput over slow links, and the latency of each question; auto: as "
            "many as keep the busiest of stages, links and devices at work. 1 is best for the latency of one.",
        ),
        click.option(
            "--stage-workers",
            type=click.IntRange(min=1),
            default=DEFAULTS.stage_workers,
            metavar="N",
            help="Stages computed at a time, each of another microbatch in flight and with --threads of its own: on N cores "
            "N workers of one thread give more throughput than one of N threads.",
        ),
    )


def json_option(function: AnyFunction) -> AnyFunction:
    """Add --json."""
    return _with_options(
        function,
        click.option("--json", "json_path", type=NewFile(), help="Keep the result; - prints it."),
    )


def _with_options(function: AnyFunction, *options: Callable[[AnyFunction], AnyFunction]) -> AnyFunction:
    for option in reversed(options):
        function = option(function)
    return function


def check_policies(texts: tuple[str, ...]) -> None:
    """Refuse policies that cannot be parsed, before it is known what `auto` stands for."""
    from wdmoe.bs.policies import parse_policy, resolve_auto

    with _bad_policy():
        for text in texts:
            parse_policy(resolve_auto(text, calibrated=False))


def parse_policies(texts: tuple[str, ...], known: Path | Trace) -> list[Policy]:
    """Parse --policy, exact first; what cannot be parsed is a bad parameter. What `auto` stands for is told.

    Args:
        texts: as users type them.
        known: bundle or trace whose calibration `auto` goes by.
    """
    from wdmoe.bs.policies import AUTO, check_budgets, parse_policy, resolve_auto
    from wdmoe.bs.policies.options import Options

    check_policies(texts)
    calibrated = AUTO in texts and bool(_calibrated(known))
    policies = [parse_policy(resolve_auto(text, calibrated)) for text in texts]
    for policy in policies:
        if isinstance(policy, Options) and policy.loss < math.inf and policy.importance not in _calibrated(known):
            raise click.BadParameter(policy.uncalibrated(), param_hint="--policy")  # now, not when its turn comes
    if several := [policy for policy in policies if len(getattr(policy, "budget", ())) > 1]:
        n_blocks = _manifest(known).model.n_blocks if isinstance(known, Path) else known.n_blocks
        with _bad_policy():
            for policy in several:
                check_budgets(policy, n_blocks)
    if AUTO in texts:
        missing = (
            f"{known} is not calibrated; wdmoe-bs calibrate measures, on a text of yours, what each block loses"
            if isinstance(known, Path)
            else "the trace is of a bundle that was not calibrated; run wdmoe-bs calibrate, then record it again"
        )
        say(f"auto: {resolve_auto(AUTO, calibrated)}{'' if calibrated else f', with its default budget: {missing}'}")
    # Exact is the control: it goes first, so that the others can be compared with it.
    return sorted(policies, key=lambda policy: policy.describe() != "exact")


@contextmanager
def _bad_policy() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--policy") from error


def _calibrated(known: Path | Trace) -> set[str]:
    """Return the kinds of importance that a bundle or a trace was calibrated for."""
    if not isinstance(known, Path):
        return set(known.info.sensitivity or {})
    from wdmoe.bs.sensitivity import read_sensitivity
    from wdmoe.bs.station import bs_folder

    found = read_sensitivity(bs_folder(known), _manifest(known))
    return set() if found is None else set(found.by_importance)


def _manifest(bundle: Path) -> BsManifest:
    from wdmoe.bs.station import bs_folder
    from wdmoe.runtime.manifest import BsManifest, read_manifest

    return read_manifest(bs_folder(bundle), BsManifest)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn what a user can mend into a message and exit code 1 (2 for bad options), and Ctrl-C into 130."""
    if threading.current_thread() is threading.main_thread():
        # So that devices are told, and look for the next base station at once.
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        say("interrupted; the devices were told")
        raise SystemExit(130) from None


def say(text: str) -> None:
    """Tell the user what goes on, on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress_bars(totals: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
    """Show one bar per name on stderr, for those with anything to do; what is yielded advances a bar by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {name: progress.add_task(name, total=total, start=False) for name, total in totals.items() if total}

        def advance(name: str) -> None:
            progress.start_task(bars[name])
            progress.advance(bars[name])

        yield advance


def print_table(table: Any) -> None:
    """Show something of rich's on stdout."""
    from rich.console import Console

    Console().print(table, "")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all; - prints it."""
    text = json.dumps(result, indent=1) + "\n"
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    with written_whole(path) as partial:
        partial.write_text(text)


def command_line() -> str:
    """Return the command as the user gave it."""
    return shlex.join(["wdmoe-bs", *sys.argv[1:]])
