"""Readers of evaluation files: from the lines of a file on disk to rows in the schema of the judge's own task.

Where a file joins what the task's template joins anyway, it is taken apart again: any cut gives the same prompt, and
`tests/bs/test_row_formats.py` compares. Where something is lost, the entry in `wdmoe.bs.rows` says so.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from wdmoe.runtime.errors import DataError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Row = dict[str, "str | int | list[str] | dict[str, list[str]]"]  # one document, as the templates of the task read it
Reader = Callable[["Traversable"], list[Row]]  # from the folder that holds the files
RowType = TypeVar("RowType", bound=msgspec.Struct)

_FILLER = "_"  # stands in WinoGrande's sentences for what is to be chosen
_COPA_QUESTIONS = {"because": "cause", "therefore": "effect"}


class _Piqa(msgspec.Struct):
    """A row of PIQA's official files, whose labels lie in a second file."""

    goal: str
    sol1: str
    sol2: str


class _LabelledPiqa(_Piqa):
    label: Literal[0, 1]


class _Choices(msgspec.Struct):
    """A question with its choices, as most local files have it."""

    query: str
    choices: list[str]
    gold: int

    def __post_init__(self) -> None:
        """Refuse an index of no choice."""
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold is {self.gold}, but there are {len(self.choices)} choices, counted from 0")


class _Contexts(msgspec.Struct):
    """A row of WinoGrande for partial evaluation: which context makes the continuation more likely."""

    context_options: list[str]
    continuation: str
    gold: Literal[0, 1]


class _LastWord(msgspec.Struct):
    """A row of LAMBADA."""

    context: str
    continuation: str


def read_piqa(folder: Traversable) -> list[Row]:
    """Read PIQA's official files."""
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


def read_piqa_sample(folder: Traversable) -> list[Row]:
    """Read the questions that come with wdmoe."""
    return [msgspec.structs.asdict(row) for row in _decode_lines(folder / "piqa-sample.jsonl", _LabelledPiqa)]


def read_arc(folder: Traversable) -> list[Row]:
    """Read ARC; the letters of the choices, which only name the right one, are given anew."""

    def arc(row: _Choices) -> Row:
        return {"question": row.query, **_lettered(row)}

    return _rows(folder / "test.jsonl", _Choices, arc)


def read_openbookqa(folder: Traversable) -> list[Row]:
    """Read OpenBookQA; letters as for ARC."""

    def openbookqa(row: _Choices) -> Row:
        return {"question_stem": row.query, **_lettered(row)}

    return _rows(folder / "test.jsonl", _Choices, openbookqa)


def read_boolq(folder: Traversable) -> list[Row]:
    """Read BoolQ from `Passage: ...`, `Question: ...?` on the last line, and the choices no and yes."""

    def boolq(row: _Choices) -> Row:
        start, middle, end = "Passage: ", "\nQuestion: ", "?"
        if not (row.query.startswith(start) and row.query.count(middle) == 1 and row.query.endswith(end)):
            raise ValueError(f"`query` is not `{start}...{middle!r}...{end}`, with each mark once")
        if row.choices != ["no", "yes"]:
            raise ValueError(f"choices are {row.choices}, expected no and yes, in that order")
        passage, question = row.query.removeprefix(start).removesuffix(end).split(middle)
        return {"passage": passage, "question": question, "label": row.gold}

    return _rows(folder / "validation.jsonl", _Choices, boolq)


def read_hellaswag(folder: Traversable) -> list[Row]:
    """Read HellaSwag from `{activity_label}: {ctx}`."""

    def hellaswag(row: _Choices) -> Row:
        label, colon, context = row.query.partition(": ")
        if not colon:
            raise ValueError("`query` holds no `: ` between label and context")
        return {
            "activity_label": label,
            "ctx_a": context,
            "ctx_b": "",
            "endings": row.choices,
            "label": str(row.gold),
        }

    return _rows(folder / "validation.jsonl", _Choices, hellaswag)


def read_winogrande(folder: Traversable) -> list[Row]:
    """Read WinoGrande; the contexts' common beginning stands before the gap, wherever exactly it is cut."""

    def winogrande(row: _Contexts) -> Row:
        if len(row.context_options) != 2:
            raise ValueError(f"there are {len(row.context_options)} contexts, expected 2")
        first, second = row.context_options
        if _FILLER in first + second + row.continuation:
            raise ValueError(f"the text holds {_FILLER!r}, which marks the gap")
        common = 0
        while common < min(len(first), len(second)) and first[common] == second[common]:
            common += 1
        return {
            "sentence": f"{first[:common]}{_FILLER} {row.continuation}",
            "option1": first[common:],
            "option2": second[common:],
            "answer": str(row.gold + 1),
        }

    return _rows(folder / "validation.jsonl", _Contexts, winogrande)


def read_siqa(folder: Traversable) -> list[Row]:
    """Read Social IQa; the template puts a space between context and question, so any space can part them."""

    def siqa(row: _Choices) -> Row:
        context, space, question = row.query.partition(" ")
        if not space or len(row.choices) != 3:
            raise ValueError("expected context and question with a space between them, and 3 choices")
        answers = dict(zip(("answerA", "answerB", "answerC"), row.choices, strict=True))
        return {"context": context, "question": question, **answers, "label": str(row.gold + 1)}

    return _rows(folder / "validation.jsonl", _Choices, siqa)


def read_copa(folder: Traversable) -> list[Row]:
    """Read COPA from `{premise without its full stop}, because` or `therefore`."""

    def copa(row: _Choices) -> Row:
        premise, comma, connector = row.query.rpartition(", ")
        if not comma or connector not in _COPA_QUESTIONS or len(row.choices) != 2:
            raise ValueError("expected a `query` that ends in `, because` or `, therefore`, and 2 choices")
        return {
            "premise": f"{premise}.",  # the template drops the last character, whichever it is
            "question": _COPA_QUESTIONS[connector],
            "choice1": row.choices[0],
            "choice2": row.choices[1],
            "label": row.gold,
        }

    return _rows(folder / "validation.jsonl", _Choices, copa)


def read_lambada(folder: Traversable) -> list[Row]:
    """Read LAMBADA; the template splits context and last word at the last space."""

    def lambada(row: _LastWord) -> Row:
        if not row.continuation or " " in row.continuation:
            raise ValueError(f"continuation is {row.continuation!r}, expected one word")
        return {"text": f"{row.context} {row.continuation}"}

    return _rows(folder / "test.jsonl", _LastWord, lambada)


def read_wikitext(folder: Traversable) -> list[Row]:
    """Read WikiText, one document from each title line to the next.

    The rule is that of the published document-level data set, which the task names: some formulas between equals
    signs count as titles there, and so they do here.
    """
    pages: list[list[str]] = [[]]
    for line in _lines(folder / "test.txt"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [{"page": page} for page in map("\n".join, pages) if page.strip()]


def _lettered(row: _Choices) -> Row:
    letters = list(string.ascii_uppercase[: len(row.choices)])
    return {"choices": {"text": row.choices, "label": letters}, "answerKey": letters[row.gold]}


def _rows(file: Traversable, row_type: type[RowType], convert: Callable[[RowType], Row]) -> list[Row]:
    """Decode and convert each line; the ValueError of a line that cannot be converted gets its place."""
    rows = []
    for number, row in enumerate(_decode_lines(file, row_type), start=1):
        try:
            rows.append(convert(row))
        except ValueError as error:
            raise DataError(f"{file}:{number}: {error}") from error
    return rows


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
