"""The data sets that can be evaluated: the judge's task of each, and where its rows come from.

A data set that is not in `DATASETS` cannot be evaluated; one more is one more entry and its reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from wdmoe.bs import row_formats
from wdmoe.bs.row_formats import Reader, Row
from wdmoe.runtime.errors import DataError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["DATASETS", "DataSet", "Row", "find_dataset", "read_rows"]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the rows of one data set come from, and the task that judges them."""

    task_file: str  # YAML of the task, below the folder lm_eval/tasks
    read: Reader
    files: tuple[str, ...]  # in the data set's folder
    bundled: bool = False  # the files come with wdmoe: neither --data-dir nor the hub is asked
    local_variant: str | None = None  # why the prompts of local rows differ from the task's own; None: they do not


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


_TEST, _VALIDATION = ("test.jsonl",), ("validation.jsonl",)

DATASETS = {
    "piqa": DataSet("piqa/piqa.yaml", row_formats.read_piqa, ("valid.jsonl", "valid-labels.lst")),
    # Rows of our own in PIQA's format: a score on them is not a PIQA score and is never called one.
    "piqa-sample": DataSet("piqa/piqa.yaml", row_formats.read_piqa_sample, ("piqa-sample.jsonl",), bundled=True),
    "arc_easy": DataSet("arc/arc_easy.yaml", row_formats.read_arc, _TEST),
    "arc_challenge": DataSet("arc/arc_challenge.yaml", row_formats.read_arc, _TEST),
    "boolq": DataSet(
        "super_glue/boolq/default.yaml",
        row_formats.read_boolq,
        _VALIDATION,
        local_variant="passages lack the title that SuperGLUE puts before them",
    ),
    "hellaswag": DataSet(
        "hellaswag/hellaswag.yaml",
        row_formats.read_hellaswag,
        _VALIDATION,
        local_variant="where ctx_b begins is lost, so it is not capitalised; endings have no space before them",
    ),
    "winogrande": DataSet("winogrande/default.yaml", row_formats.read_winogrande, _VALIDATION),
    "openbookqa": DataSet("openbookqa/openbookqa.yaml", row_formats.read_openbookqa, _TEST),
    "siqa": DataSet("siqa/siqa.yaml", row_formats.read_siqa, _VALIDATION),
    "copa": DataSet("super_glue/copa/default.yaml", row_formats.read_copa, _VALIDATION),
    "lambada": DataSet("lambada/lambada_openai.yaml", row_formats.read_lambada, _TEST),
    "wikitext2": DataSet(
        "wikitext/wikitext.yaml",
        row_formats.read_wikitext,
        ("test.txt",),
        local_variant="word-level text with <unk>, where the task has the raw text",
    ),
}
