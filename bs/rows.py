"""Evaluation rows as they lie on disk, in the schema that the judge's own task expects.

A data set that is not in `DATASETS` cannot be evaluated; one more is one more entry and its reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from wdmoe.runtime.errors import DataError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Row = dict[str, str | int]  # one document, as the templates of the task read it
RowType = TypeVar("RowType", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the rows of one data set come from, and the task that judges them."""

    task_file: str  # YAML of the task, below the folder lm_eval/tasks
    read: Callable[[Traversable], list[Row]]  # from the folder that holds `files`
    files: tuple[str, ...]
    bundled: bool = False  # the files come with wdmoe: neither --data-dir nor the hub is asked


def find_dataset(name: str) -> DataSet:
    """Return the entry of `DATASETS`; the ValueError for any other name lists them."""
    try:
        return DATASETS[name]
    except KeyError:
        raise ValueError(f"data set {name!r} is not known; known are: {', '.join(DATASETS)}") from None


def read_rows(name: str, data_dir: Path | None = None) -> list[Row]:
    """Read all rows of a data set from `data_dir/NAME`, or from `data_dir` itself where that folder is not there.

    Raises:
        ValueError: no such data set, or no folder for one that is not bundled.
        DataError: a file is missing, or a line is not what it should be.
    """
    dataset = find_dataset(name)
    folder: Traversable
    if dataset.bundled:
        folder = resources.files("wdmoe.bs") / "data"
    elif data_dir is None:
        raise ValueError(f"data set {name!r} is not bundled: pass the folder that holds it")
    else:
        folder = data_dir / name if (data_dir / name).is_dir() else data_dir
    rows = dataset.read(folder)
    if not rows:
        raise DataError(f"{folder / dataset.files[0]} holds no rows; expected one JSON object a line")
    return rows


class _Piqa(msgspec.Struct):
    """A row of PIQA's official files, whose labels lie in a second file."""

    goal: str
    sol1: str
    sol2: str


class _LabelledPiqa(_Piqa):
    label: Literal[0, 1]


def _read_piqa(folder: Traversable) -> list[Row]:
    rows_file, labels_file = folder / "valid.jsonl", folder / "valid-labels.lst"
    rows = _decode_lines(rows_file, _Piqa)
    labels = _lines(labels_file)
    if len(rows) != len(labels):
        raise DataError(
            f"{labels_file} holds {len(labels)} labels for the {len(rows)} rows of {rows_file}; "
            f"expected one label a row: take both files from the same copy of PIQA"
        )
    for number, label in enumerate(labels, start=1):
        if label not in ("0", "1"):
            raise DataError(
                f"{labels_file}:{number}: got label {label!r}; expected 0 (sol1 is right) or 1 (sol2 is right)"
            )
    return [msgspec.structs.asdict(row) | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _read_piqa_sample(folder: Traversable) -> list[Row]:
    return [msgspec.structs.asdict(row) for row in _decode_lines(folder / "piqa-sample.jsonl", _LabelledPiqa)]


def _decode_lines(file: Traversable, row_type: type[RowType]) -> list[RowType]:
    decoder = msgspec.json.Decoder(row_type)

    def decode(number: int, line: str) -> RowType:
        try:
            return decoder.decode(line)
        except msgspec.DecodeError as error:
            fields = ", ".join(field.name for field in msgspec.structs.fields(row_type))
            raise DataError(
                f"{file}:{number}: {error}; expected one JSON object a line, with the fields {fields}"
            ) from error

    return [decode(number, line) for number, line in enumerate(_lines(file), start=1)]


def _lines(file: Traversable) -> list[str]:
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise DataError(
            f"cannot read {file}: {error.strerror or error}; "
            f"--data-dir names the folder that holds the data set's own folder, or that folder itself"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); take a fresh copy") from error
    # NOTE: not `splitlines`, which also splits at characters that JSON allows inside a string, such as U+2028.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


DATASETS = {
    "piqa": DataSet("piqa/piqa.yaml", _read_piqa, ("valid.jsonl", "valid-labels.lst")),
    # Rows of our own in PIQA's format: a score on them is not a PIQA score and is never called one.
    "piqa-sample": DataSet("piqa/piqa.yaml", _read_piqa_sample, ("piqa-sample.jsonl",), bundled=True),
}
