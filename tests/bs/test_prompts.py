"""The exact text of prompts is pinned: another prompt is another benchmark."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from judged import TOKENIZER, TableScorer, prompts

from wdmoe.bs.evaluation import evaluate, load_task

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

DATA_DIR = Path(os.environ.get("WDMOE_DATA_DIR", Path(__file__).parents[3] / "shared/data"))


def test_the_prompt_of_a_bundled_row_is_pinned() -> None:
    scorer = TableScorer()
    evaluate(load_task("piqa-sample"), scorer, TOKENIZER, max_length=1000, limit=2)
    prompt = "Question: Shift a heavy wardrobe across a carpet.\nAnswer:"
    assert prompts(scorer.asked)[1] == [
        (prompt, " Slip smooth plastic lids under its feet and push."),
        (prompt, " Slip grippy rubber mats under its feet and push."),
    ]


@pytest.mark.skipif(
    not (DATA_DIR / "piqa/valid.jsonl").is_file(),
    reason=f"no PIQA rows in {DATA_DIR}: set WDMOE_DATA_DIR to the folder that holds piqa/",
)
def test_the_prompt_of_the_first_piqa_row_is_pinned_and_equals_the_judges_own() -> None:
    scorer = TableScorer()
    evaluate(load_task("piqa", DATA_DIR), scorer, TOKENIZER, max_length=1000, limit=20)
    asked = prompts(scorer.asked)

    # Evaluation rows are not copied into this repository, so the exact text is pinned by its hash.
    (prompt, first), (same_prompt, second) = asked[0]
    assert prompt == same_prompt
    assert prompt.startswith("Question: ") and prompt.endswith("?\nAnswer:")
    assert first.startswith(" P") and second.startswith(" P")
    digest = hashlib.sha256(json.dumps([prompt, [first, second]]).encode()).hexdigest()
    assert digest == "e2d6bc378b9d5c3c2ac536cf878782090557d64b844978a01479d0900e680f16"

    assert asked == what_lm_eval_asks(DATA_DIR / "piqa", limit=20)


def what_lm_eval_asks(folder: Path, limit: int) -> list[list[tuple[str, str]]]:
    """The prompts of lm-eval's PIQA without any class of ours, read by hand from the same files."""
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = [json.loads(line) for line in (folder / "valid.jsonl").read_bytes().split(b"\n") if line]
    labels = [int(line) for line in (folder / "valid-labels.lst").read_text().split()]
    labelled = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "piqa/piqa.yaml")
    config |= {
        "training_split": None,
        "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(labelled)},
    }
    task = ConfigurableTask(config=config)
    task.build_all_requests(limit=limit)
    asked: list[list[tuple[str, str]]] = [[] for _ in range(limit)]
    for request in task.instances:
        asked[request.doc_id].append(request.args)
    return asked
