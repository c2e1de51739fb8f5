"""Local rows ask what the judge's own task asks of the published rows; where they cannot, the entry says so."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from wdmoe.bs.evaluation import load_task
from wdmoe.bs.row_formats import Row
from wdmoe.bs.rows import DATASETS, read_rows
from wdmoe.runtime.errors import DataError

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

ROOT = Path(__file__).parents[2]
DATA_DIR = Path(os.environ.get("WDMOE_DATA_DIR", ROOT.parent / "shared/data"))

# Invented rows: as published (the schema that the task's template reads), and as the local file has the same row.
SAME_ROW: dict[str, tuple[Row, dict[str, Any]]] = {
    "arc_easy": (
        {"question": "What melts?", "choices": {"text": ["ice", "air", "fog"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"query": "What melts?", "choices": ["ice", "air", "fog"], "gold": 1},
    ),
    "arc_challenge": (
        {"question": "Which?", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
        {"query": "Which?", "choices": list("vwxyz"), "gold": 4},
    ),
    "boolq": (  # but for the title that the published passage begins with
        {"passage": "Ice floats.\nIt is light.", "question": "does ice float", "label": 1},
        {"query": "Passage: Ice floats.\nIt is light.\nQuestion: does ice float?", "choices": ["no", "yes"], "gold": 1},
    ),
    "hellaswag": (  # where the context ends with a whole sentence
        {
            "activity_label": "Baking: bread",
            "ctx_a": "[header] How to bake [title] Wait. [step] It takes  time.",
            "ctx_b": "",
            "endings": ["Rest. [substeps] Well.", "Run.", "Sing.", "Swim."],
            "label": "2",
        },
        {"ind": 4, "query": "Baking: bread: How to bake. Wait. It takes time.", "choices": ["Rest. Well.", "Run.", "Sing.", "Swim."], "gold": 2},
    ),
    "winogrande": (
        {"sentence": "The pan lid fit the pot because _ was small .", "option1": "the pot", "option2": "the pan", "answer": "2"},
        {
            "context_options": ["The pan lid fit the pot because the pot", "The pan lid fit the pot because the pan"],
            "continuation": "was small .",
            "gold": 1,
        },
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["hot", "cold", "dry", "old"], "label": list("ABCD")}, "answerKey": "B"},
        {"query": "Ice is", "choices": ["hot", "cold", "dry", "old"], "gold": 1},
    ),
    "siqa": (
        {"context": "Kim slept in. She ran.", "question": "Why did Kim run?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        {"query": "Kim slept in. She ran. Why did Kim run?", "choices": ["a", "b", "c"], "gold": 2},
    ),
    "copa": (
        {"premise": "The ice, thick as it was, melted. ", "question": "cause", "choice1": "The sun shone.", "choice2": "I slept.", "label": 0},
        {"query": "The ice, thick as it was, melted, because", "choices": ["the sun shone.", "i slept."], "gold": 0},
    ),
    "lambada": (
        {"text": "She said: \"Ice\n melts in the sun"},
        {"context": "She said: \"Ice\n melts in the", "continuation": "sun"},
    ),
}  # fmt: skip


def asked(dataset: str, rows: Sequence[Row]) -> tuple[list[Any], list[Any]]:
    """The judge's requests, before any class of ours sees them, and what it takes for right."""
    from wdmoe.bs.harness import RowsTask, quiet

    with quiet():
        task = RowsTask(dataset, rows)
        task.build_all_requests()
    requests = [(request.doc_id, request.idx, request.args) for request in task.instances]
    return requests, [right_answer(task, row) for row in task.eval_docs]


def right_answer(task: Any, row: Row) -> Any:
    if task.multiple_input:
        return task.doc_to_text(row)
    target = task.doc_to_target(row)
    return task.doc_to_choice(row).index(target) if task.config.task == "copa" else target


def write(folder: Path, dataset: str, text: str) -> Path:
    (folder / dataset).mkdir(exist_ok=True)
    (folder / dataset / DATASETS[dataset].files[0]).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("dataset", SAME_ROW)
def test_a_local_row_asks_what_the_published_row_asks(dataset: str, tmp_path: Path) -> None:
    published, local = SAME_ROW[dataset]
    rows = read_rows(dataset, write(tmp_path, dataset, json.dumps(local) + "\n"))
    assert asked(dataset, rows) == asked(dataset, [published])


def test_hellaswags_local_variant_differs_by_a_capital_and_a_space(tmp_path: Path) -> None:
    published: Row = {
        "activity_label": "Baking",
        "ctx_a": "It takes time.",
        "ctx_b": "the baker",
        "endings": ["[substeps] Rest.", "Run.", "Sing.", "Swim."],
        "label": "0",
    }
    query, choices = "Baking: It takes time. the baker", ["Rest.", "Run.", "Sing.", "Swim."]
    rows = read_rows(
        "hellaswag", write(tmp_path, "hellaswag", json.dumps({"query": query, "choices": choices, "gold": 0}))
    )
    (ours, gold), (theirs, their_gold) = asked("hellaswag", rows), asked("hellaswag", [published])
    assert gold == their_gold
    assert [args for _, _, args in ours] == [(query, f" {choice}") for choice in choices]
    capital = "Baking: It takes time. The baker"
    assert [args for _, _, args in theirs] == [(capital, "  Rest."), *((capital, f" {c}") for c in choices[1:])]


def test_wikitext_is_cut_before_each_title(tmp_path: Path) -> None:
    text = " \n = Ice = \n \n Ice floats . \n = = Use = = \n It cools . \n = Sun = \n Hot . \n"
    rows = read_rows("wikitext2", write(tmp_path, "wikitext2", text))
    assert [row["page"] for row in rows] == [
        " = Ice = \n \n Ice floats . \n = = Use = = \n It cools . ",
        " = Sun = \n Hot . ",
    ]
    requests, _ = asked("wikitext2", rows)
    assert requests[0][2] == (" = Ice =\n\nIce floats.\n== Use ==\nIt cools. ",)


QUERY = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("arc_easy", QUERY | {"gold": 2}, r"test\.jsonl:1: gold is 2, but there are 2 choices, counted from 0"),
        ("arc_easy", {"query": "q"}, r"`choices`.*with the fields query, choices, gold"),
        ("boolq", QUERY | {"query": "Passage: p"}, r"validation\.jsonl:1: `query` is not `Passage: \.\.\."),
        ("boolq", QUERY | {"query": "Passage: p\nQuestion: q?"}, r"choices are \['a', 'b'\], expected no and yes"),
        ("hellaswag", QUERY, r"`query` holds no `: ` between label and context"),
        ("winogrande", {"context_options": ["a"], "continuation": "c", "gold": 0}, "there are 1 contexts, expected 2"),
        ("winogrande", {"context_options": ["a_", "b"], "continuation": "c", "gold": 0}, "the text holds '_'"),
        ("winogrande", {"context_options": ["a", "b"], "continuation": "c", "gold": 2}, "Invalid enum value 2"),
        ("siqa", QUERY | {"query": "two words"}, "a space between them, and 3 choices"),
        ("copa", QUERY | {"query": "It rained, so"}, "ends in `, because` or `, therefore`"),
        ("lambada", {"context": "c", "continuation": "two words"}, "continuation is 'two words', expected one word"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_named(
    dataset: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(dataset, write(tmp_path, dataset, json.dumps(row)))


# Evaluation rows are not copied into this repository: the first row's prompts are pinned by how they begin and end,
# and their exact text, choices and right answer by a hash.
PINNED = {
    "arc_easy": (
        "Question: Which ",
        "?\nAnswer:",
        4,
        "d3ad3b4353f46fca2a7ec97a215b348d718d16e50f384bae8248a6dbe6fc1911",
    ),
    "arc_challenge": (
        "Question: An ",
        "?\nAnswer:",
        4,
        "3b12404d352c3e4c62afdf89514bd6157caf8fb1e9cee0127a386a51e0d5c275",
    ),
    "boolq": ("All ", "?\nAnswer:", 2, "f30e1e73cb76574585a8d4fccb9e4a12339c2c75264260f8040adfecf021a045"),
    "hellaswag": ("Roof ", " he", 4, "36e9c7b8fcf27065f8ea5befcfe1d250a709338d83235eab7b9bd7807c1ad423"),
    "winogrande": ("Sarah was ", " so Sarah", 2, "13d9c34849f8d306f4dbf3c9eae15c86056877afcdae3ea9b7077986db72b806"),
    "openbookqa": ("A person ", " is to", 4, "e2514ffbdbffb2f17dfb9f7db404cb7eb0ce4f552a307f264537c4fcec6bedd3"),
    "siqa": ("Q: Tracy ", "?\nA:", 3, "03d80a465e226ad774b5695efb56783f553ffe264b581c8be29a1eee1e4e5cf3"),
    "copa": ("The man ", " therefore", 2, "e53171ed9c38a9dbe6b1747a3afc7b1d3e2d108710c9e0ea6fff63372ec7e30b"),
    "lambada": ("In my ", " about", 1, "4d73116be0c82ac64ac37b8ce7d5e663219c4d7ebb5c7e5b187d79e867eb1ace"),
    "wikitext2": ("", "", 1, "7fb04ac8fefb150f50a2d3016222b2608eef4065cbbb399887d9191398c4c3b1"),
}


@pytest.mark.parametrize("dataset", PINNED)
def test_the_prompts_of_the_first_row_are_pinned(dataset: str) -> None:
    if not (DATA_DIR / dataset / DATASETS[dataset].files[0]).is_file():
        pytest.skip(f"no rows of {dataset} in {DATA_DIR}: set WDMOE_DATA_DIR to the folder that holds {dataset}/")
    from wdmoe.bs.harness import quiet

    task = load_task(dataset, DATA_DIR)
    assert task.variant == DATASETS[dataset].local_variant
    with quiet():
        task.judge.build_all_requests(limit=1)
    arguments = [request.args for request in task.judge.instances]
    begin, end, choices, digest = PINNED[dataset]
    context = arguments[0][0] if len(arguments[0]) == 2 else ""
    assert (context[: len(begin)], context[len(context) - len(end) :], len(arguments)) == (begin, end, choices)
    if len(arguments[0]) == 2:
        assert all(continuation.startswith(" ") for _, continuation in arguments)
    right = right_answer(task.judge, task.judge.eval_docs[0])
    assert hashlib.sha256(json.dumps([arguments, right]).encode()).hexdigest() == digest


def question_and_answer(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"Question: {row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]


def cleaned(text: str) -> str:
    """HellaSwag's text without what stands in brackets; the local file still has a few of them."""
    return re.sub(r"\[.*?\]", "", text.strip()).replace("  ", " ")


# What each local row must ask, from its own text and the published template, with no field in between.
TEXTS: dict[str, Callable[[dict[str, Any]], list[tuple[str, str]]]] = {
    "arc_easy": question_and_answer,
    "arc_challenge": question_and_answer,
    "boolq": lambda row: [(f"{row['query'].removeprefix('Passage: ')}\nAnswer:", answer) for answer in (" no", " yes")],
    "hellaswag": lambda row: [(cleaned(row["query"]), f" {cleaned(choice)}") for choice in row["choices"]],
    "winogrande": lambda row: [(context, f" {row['continuation']}") for context in row["context_options"]],
    "openbookqa": lambda row: [(row["query"], f" {choice}") for choice in row["choices"]],
    "siqa": lambda row: [(f"Q: {row['query']}\nA:", f" {choice}") for choice in row["choices"]],
    # NOTE: two spaces: the task's choices begin with one, and the judge puts its own before them.
    "copa": lambda row: [
        (row["query"].replace(", therefore", " therefore").replace(", because", " because"), f"  {choice}")
        for choice in row["choices"]
    ],
    "lambada": lambda row: [(row["context"], f" {row['continuation']}")],
}


@pytest.mark.parametrize("dataset", TEXTS)
def test_taking_local_rows_apart_loses_nothing(dataset: str) -> None:
    file = DATA_DIR / dataset / DATASETS[dataset].files[0]
    if not file.is_file():
        pytest.skip(f"no rows of {dataset} in {DATA_DIR}: set WDMOE_DATA_DIR to the folder that holds {dataset}/")
    local = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    some = range(0, len(local), 1 + len(local) // 300)
    rows = read_rows(dataset, DATA_DIR)
    assert len(rows) == len(local)
    requests, right = asked(dataset, [rows[i] for i in some])
    expected = [(i, args) for i, index in enumerate(some) for args in TEXTS[dataset](local[index])]
    assert [(i, args) for i, _, args in requests] == expected
    if dataset != "lambada":
        assert [int(index) for index in right] == [local[i]["gold"] for i in some]
