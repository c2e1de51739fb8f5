"""What the commands of `wdmoe-export` share: how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from wdmoe.runtime.errors import WdmoeError

INTERRUPTED = 130  # exit code


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
