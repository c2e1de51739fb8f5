"""Files that commands write: whether there is a place for one is asked before any work, and each is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from wdmoe.runtime.errors import OutputError


class NewFile(click.Path):
    """The type of an option that names a file to write; - is let through, for commands that print it."""

    def __init__(self) -> None:
        """Take paths."""
        super().__init__(path_type=Path, dir_okay=False)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Refuse what cannot be written at the end of the work."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if str(path) == "-":
            return path
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}; make it, or give another name", param, ctx)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            self.fail(f"{path}: the folder {path.parent} is not writable; give another name", param, ctx)
        return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Lend a temporary name, and give the file its own once it is written; what is there stays if it cannot be.

    Raises:
        OutputError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
