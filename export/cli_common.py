"""What the commands of `wdmoe-export` share: how errors and progress are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import click

from wdmoe.runtime.errors import WdmoeError

INTERRUPTED = 130  # exit code
_LINE_EVERY_S = 30.0


@contextmanager
def plain_errors(interrupted: str) -> Iterator[None]:
    """Turn what can go wrong into one line and an exit code."""
    try:
        yield
    except WdmoeError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")) from error
    except ImportError as error:
        raise click.ClickException(f"{error}; install what an export needs: pip install 'wdmoe[export]'") from error
    except KeyboardInterrupt:
        click.echo(interrupted, err=True)
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def usage_errors() -> Iterator[None]:
    """Tell of options that do not fit the model as click tells of others."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def refuse_options_before(context: click.Context) -> None:
    """Refuse options of an export in front of the name of a command, where they would do nothing.

    Raises:
        click.UsageError: names the first.
    """
    for option in context.command.params:
        if context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} does not go before the command {context.invoked_subcommand}")


def progress_lines(
    task: str,
    total: int,
    unit: Literal["bytes", "blocks"],
    say: Callable[[str], None],
    now_s: Callable[[], float] = time.monotonic,
) -> Callable[[int], None]:
    """Return what counts progress and says a line of it every half a minute, for where there is no terminal."""
    started_s = said_s = now_s()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, said_s
        done += more
        if (at_s := now_s()) - said_s < _LINE_EVERY_S:
            return
        said_s = at_s
        rate = done / (at_s - started_s)
        shown = f"{done} of {total} blocks"
        if unit == "bytes":
            shown = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
        say(f"{task}: {shown}, {max(0, total - done) / rate:.0f} s left" if rate else f"{task}: {shown}")

    return advance
