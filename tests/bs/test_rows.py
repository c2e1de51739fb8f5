import json
from pathlib import Path

import pytest

from wdmoe.bs.rows import DATASETS, Row, read_rows
from wdmoe.runtime.errors import DataError

ROWS = [
    {"goal": "Boil an egg.", "sol1": "Put it in boiling water.", "sol2": "Put it in the freezer."},
    {"goal": "Dry a shirt\u2028fast.", "sol1": "Fold it wet.", "sol2": "Hang it in the wind."},
]


def write_piqa(folder: Path, rows: str | None = None, labels: str | None = "0\n1\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if rows is None:
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (folder / "valid.jsonl").write_text(rows, encoding="utf-8")
    if labels is not None:
        (folder / "valid-labels.lst").write_text(labels)
    return folder


@pytest.mark.parametrize("below", ["piqa", "."])
def test_piqa_is_found_in_its_folder_or_one_above(tmp_path: Path, below: str) -> None:
    write_piqa(tmp_path / below)
    expected: list[Row] = [{**ROWS[0], "label": 0}, {**ROWS[1], "label": 1}]
    assert read_rows("piqa", tmp_path) == expected


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_last_line_may_end_anyhow(tmp_path: Path, ending: str) -> None:
    write_piqa(tmp_path, rows=json.dumps(ROWS[0]) + ending, labels="1" + ending)
    assert [row["label"] for row in read_rows("piqa", tmp_path)] == [1]


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (None, None, r"cannot read .*valid-labels\.lst: No such file or directory; --data-dir names"),
        (None, "0\n", r"valid-labels\.lst holds 1 labels for the 2 rows of .*valid\.jsonl; .*same copy"),
        (None, "0\n2\n", r"valid-labels\.lst:2: got label '2'; expected 0 \(sol1 is right\) or 1"),
        (None, "0\n\n1\n", r"holds 3 labels for the 2 rows"),
        ('{"goal": "a", "sol1": "b", "sol2": "c"}\n{"goal": \n', "0\n1\n", r"valid\.jsonl:2: .*truncated"),
        ('{"goal": "a", "sol1": "b"}\n', "0\n", r"valid\.jsonl:1: .*`sol2`.*with the fields goal, sol1, sol2"),
        ('{"goal": "a", "sol1": 1, "sol2": "c"}\n', "0\n", r"valid\.jsonl:1: Expected `str`, got `int`"),
        ("", "", r"valid\.jsonl holds no rows"),
    ],
)
def test_damaged_piqa_files_are_named_with_their_line(
    tmp_path: Path, rows: str | None, labels: str | None, message: str
) -> None:
    write_piqa(tmp_path, rows, labels)
    with pytest.raises(DataError, match=message):
        read_rows("piqa", tmp_path)


def test_a_missing_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/valid\.jsonl: No such file"):
        read_rows("piqa", tmp_path / "nowhere")


def test_text_that_is_not_utf8_is_a_data_error(tmp_path: Path) -> None:
    (write_piqa(tmp_path) / "valid.jsonl").write_bytes(b'{"goal": "\xff"}\n')
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_rows("piqa", tmp_path)


def test_an_unknown_data_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'pica' is not known; known are: {', '.join(DATASETS)}"):
        read_rows("pica", None)


def test_the_bundled_sample_needs_no_folder_and_has_the_schema_of_piqa(tmp_path: Path) -> None:
    rows = read_rows("piqa-sample")
    assert rows == read_rows("piqa-sample", tmp_path)
    assert all(list(row) == ["goal", "sol1", "sol2", "label"] and row["label"] in (0, 1) for row in rows)
    assert len({row["goal"] for row in rows}) == len(rows) > 0
