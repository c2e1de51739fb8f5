from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judged import BOS, TOKENIZER, TableScorer, byte_tokenizer, decode, prompts

from wdmoe.bs.evaluation import (
    Evaluation,
    LoadedTask,
    evaluate,
    evaluate_lm,
    load_task,
    paired_difference,
    pooled_difference,
)
from wdmoe.bs.questions import Answer, Question
from wdmoe.runtime.errors import DataError, EngineError, WdmoeError

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

ROOT = Path(__file__).parents[2]

# Chosen by hand so that acc and acc_norm disagree: see `LOG_LIKELIHOODS`.
ROWS: list[tuple[str, str, str, int]] = [
    ("Boil an egg.", "Use boiling water.", "Use a very cold freezer and wait.", 0),
    ("Dry a shirt.", "Fold it.", "Hang it outside in the wind.", 1),
    ("Cut bread.", "With a knife.", "With soup.", 0),
]
LOG_LIKELIHOODS = {
    # continuation: sum of log-probabilities; acc takes the largest, acc_norm the largest per character
    " Use boiling water.": -10.0,  # / 18 = -0.556
    " Use a very cold freezer and wait.": -12.0,  # / 33 = -0.364: right by acc, wrong by acc_norm
    " Fold it.": -8.0,  # / 8 = -1.0
    " Hang it outside in the wind.": -9.0,  # / 28 = -0.321: wrong by acc, right by acc_norm
    " With a knife.": -1.0,
    " With soup.": -30.0,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> LoadedTask:
    return write_task(tmp_path_factory.mktemp("data"))


def write_task(data_dir: Path, rows: Sequence[tuple[str, str, str, int]] = ROWS) -> LoadedTask:
    (data_dir / "piqa").mkdir(exist_ok=True)
    lines = [json.dumps({"goal": goal, "sol1": sol1, "sol2": sol2}) for goal, sol1, sol2, _ in rows]
    (data_dir / "piqa/valid.jsonl").write_text("\n".join(lines) + "\n")
    (data_dir / "piqa/valid-labels.lst").write_text("".join(f"{label}\n" for *_, label in rows))
    return load_task("piqa", data_dir)


def run(task: LoadedTask, scorer: TableScorer | None = None, **kwargs: Any) -> Evaluation:
    return evaluate(
        task,
        scorer or TableScorer(LOG_LIKELIHOODS.__getitem__),
        TOKENIZER,
        **{"max_length": 1000, **kwargs},
    )


def test_acc_and_acc_norm_equal_the_hand_computed_ones(task: LoadedTask) -> None:
    evaluation = run(task)
    assert evaluation.correct == {"acc": (1.0, 0.0, 1.0), "acc_norm": (0.0, 1.0, 1.0)}
    assert evaluation.metrics == pytest.approx({"acc": 2 / 3, "acc_norm": 2 / 3})
    assert evaluation.stderr == pytest.approx({"acc": 1 / 3, "acc_norm": 1 / 3})  # sqrt(2/3 * 1/3 / 2)
    assert evaluation.log_likelihoods == ((-10.0, -12.0), (-8.0, -9.0), (-1.0, -30.0))
    assert (evaluation.dataset, evaluation.source) == ("piqa", "local rows")
    assert (evaluation.rows, evaluation.rows_loaded) == (3, 3)
    assert evaluation.judge.startswith("lm-eval 0.4.") and "piqa/piqa.yaml version 1.0" in evaluation.judge


def test_the_choices_of_a_row_travel_as_one_question(task: LoadedTask) -> None:
    scorer = TableScorer()
    run(task, scorer)
    assert [question.name for question in scorer.asked] == ["piqa/0", "piqa/1", "piqa/2"]
    assert [decode(c.context) for c in scorer.asked[1].choices] == ["Question: Dry a shirt.\nAnswer:"] * 2
    assert [decode(c.continuation) for c in scorer.asked[1].choices] == [
        " Fold it.",
        " Hang it outside in the wind.",
    ]


def test_limit_asks_about_the_first_rows_and_each_row_is_announced_once(task: LoadedTask) -> None:
    announced: list[None] = []
    scorer = TableScorer()
    evaluation = run(task, scorer, limit=2, on_question=lambda: announced.append(None))
    assert len(announced) == len(scorer.asked) == evaluation.rows == task.count(2) == 2
    assert evaluation.rows_loaded == task.rows == task.count() == task.count(9) == 3
    assert run(task, limit=9).rows == 3


def test_one_row_has_no_standard_error(task: LoadedTask) -> None:
    evaluation = run(task, limit=1)
    assert evaluation.metrics["acc"] == 1.0
    assert math.isnan(evaluation.stderr["acc"])
    assert math.isnan(paired_difference(evaluation, evaluation).stderr_points)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_row_is_refused(task: LoadedTask, limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit is {limit}; expected at least one row"):
        run(task, limit=limit)


def test_a_task_gives_the_same_evaluation_each_time(task: LoadedTask) -> None:
    assert run(task) == run(task)


def test_the_judge_keeps_its_progress_and_logs_to_itself(
    task: LoadedTask, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_task("piqa-sample")
    run(task)
    # Its rows go through a function of the task, for which `datasets` would show a bar.
    rows = [{"query": f"Walking: step {number}", "choices": list("abcd"), "gold": 1} for number in range(3)]
    run(write_lines(tmp_path, "hellaswag", "validation.jsonl", "\n".join(map(json.dumps, rows))), TableScorer())
    assert capfd.readouterr() == ("", "")


def test_paired_difference_equals_the_hand_computed_one(task: LoadedTask) -> None:
    control = run(task)
    candidate = run(task, TableScorer(lambda text: -1.0 if "wind" in text else LOG_LIKELIHOODS[text]))
    difference = paired_difference(candidate, control)
    assert (difference.metric, difference.rows) == ("acc", 3)
    assert difference.mean_points == pytest.approx(100 / 3)  # differences 0, 1, 0
    assert difference.stderr_points == pytest.approx(100 / 3)  # sqrt((1/9 + 4/9 + 1/9) / 2 / 3)
    assert difference.interval_points == pytest.approx((100 / 3 * (1 - 1.96), 100 / 3 * (1 + 1.96)))
    same = paired_difference(candidate, control, "acc_norm")
    assert (same.mean_points, same.stderr_points) == (0.0, 0.0)


def test_only_evaluations_of_the_same_rows_are_compared(task: LoadedTask) -> None:
    with pytest.raises(ValueError, match=r"cannot compare 2 rows of piqa .* with 3 of piqa"):
        paired_difference(run(task, limit=2), run(task))
    assert paired_difference(run(task), replace(run(task), source="hub")).rows == 3


def test_pooling_takes_every_row_of_every_set_alike(task: LoadedTask, tmp_path: Path) -> None:
    more = write_task(tmp_path, ROWS[:1])
    control = [run(task), run(more)]
    candidate = [run(task, TableScorer(lambda text: -1.0 if "wind" in text else LOG_LIKELIHOODS[text])), run(more)]
    pooled = pooled_difference(candidate, control)
    assert (pooled.rows, pooled.mean_points) == pytest.approx((4, 25.0))  # differences 0, 1, 0 and 0
    assert pooled.stderr_points == pytest.approx(25.0)  # sqrt((3/16 + 9/16) / 3 / 4)
    with pytest.raises(ValueError, match=r"cannot compare 3 rows of piqa .* with 1 of piqa"):
        pooled_difference(candidate, control[::-1])
    with pytest.raises(ValueError, match="nothing to compare"):
        pooled_difference([], [])


def write_lines(folder: Path, dataset: str, file: str, text: str) -> LoadedTask:
    (folder / dataset).mkdir()
    (folder / dataset / file).write_text(text)
    return load_task(dataset, folder)


def test_the_last_word_has_accuracy_and_perplexity(tmp_path: Path) -> None:
    rows = [{"context": "ice can", "continuation": "melt"}, {"context": "a bird can", "continuation": "sing"}]
    task = write_lines(tmp_path, "lambada", "test.jsonl", "\n".join(map(json.dumps, rows)))
    scorer = TableScorer({" melt": -9.0, " sing": -10.0}.__getitem__)
    evaluation = run(task, scorer)
    assert prompts(scorer.asked) == [[("ice can", " melt")], [("a bird can", " sing")]]
    assert evaluation.metrics == pytest.approx({"perplexity": math.exp(9.5), "acc": 0.5})
    # Of the mean log-likelihood 0.5; through the exponential by the delta method.
    assert evaluation.stderr == pytest.approx({"perplexity": 0.5 * math.exp(9.5), "acc": 0.5})
    assert evaluation.correct == {"acc": (1.0, 0.0)}  # greedy, as the scorer says
    assert evaluation.log_likelihoods == ((-9.0,), (-10.0,))
    assert evaluation.perplexity == evaluation.metrics["perplexity"]


def test_running_text_has_perplexities_but_no_right_rows(tmp_path: Path) -> None:
    task = write_lines(tmp_path, "wikitext2", "test.txt", " = Ice = \n Ice floats . \n = Sun = \n Hot . \n")
    announced: list[None] = []
    evaluation = run(task, prefix_token_id=0, scorer=TableScorer(), on_question=lambda: announced.append(None))
    texts = [" = Ice =\nIce floats. ", " = Sun =\nHot. "]
    assert evaluation.log_likelihoods == tuple((-float(len(text)),) for text in texts)
    nats, words, size = sum(map(len, texts)), 8 + 7, len(" = Ice = \n Ice floats . ") + len(" = Sun = \n Hot . ")
    assert evaluation.metrics == pytest.approx(
        {
            "word_perplexity": math.exp(nats / words),  # words as split at white space, before and after too
            "byte_perplexity": math.exp(nats / size),
            "bits_per_byte": nats / size / math.log(2),
        }
    )
    assert all(math.isnan(stderr) for stderr in evaluation.stderr.values())
    assert (evaluation.correct, len(announced), task.has_accuracy) == ({}, 2, False)
    assert evaluation.perplexity == evaluation.metrics["word_perplexity"]
    assert evaluation.variant is not None and "<unk>" in evaluation.variant
    with pytest.raises(ValueError, match="wikitext2 has no acc for each row; it has none"):
        paired_difference(evaluation, evaluation)


def test_a_variant_is_one_of_local_rows_only(task: LoadedTask) -> None:
    assert run(task).variant is None and load_task("piqa-sample").variant is None


def test_the_digest_is_known_before_and_follows_the_rows_and_the_limit(task: LoadedTask, tmp_path: Path) -> None:
    evaluation = run(task, limit=2)
    assert evaluation.rows_digest == task.digest(2) != task.digest() == task.digest(9) == run(task).rows_digest
    flipped = write_task(tmp_path, [(*row[:3], 1 - row[3]) for row in ROWS])
    assert flipped.digest() != task.digest()


def test_long_prompts_lose_their_first_tokens(task: LoadedTask, caplog: pytest.LogCaptureFixture) -> None:
    scorer = TableScorer()
    run(task, scorer, max_length=40, limit=1)
    short, long = scorer.asked[0].choices
    # As in HFLM: max_length tokens go in, and the last one of the choice is only predicted.
    assert (len(long.context) + len(long.continuation), decode(long.continuation)) == (41, f" {ROWS[0][2]}")
    assert decode(long.context) == "Answer:"
    assert decode(short.context) == "uestion: Boil an egg.\nAnswer:"[-(41 - 19) :]
    assert "2 of 2 choices are longer than the model's 40 positions" in caplog.text


def test_a_choice_longer_than_the_model_is_refused(task: LoadedTask) -> None:
    with pytest.raises(DataError, match=r"piqa/0: a choice of 19 tokens does not fit the model's 18 positions"):
        run(task, max_length=18, limit=1)


def test_scores_that_are_not_numbers_are_refused(task: LoadedTask) -> None:
    with pytest.raises(EngineError, match=r"piqa/0: the model's log-likelihoods are \(nan, nan\)"):
        run(task, TableScorer(lambda text: math.nan))


def test_truncation_and_padding_asked_for_by_the_tokenizer_file_are_ignored(task: LoadedTask) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=200)
    plain, odd = TableScorer(), TableScorer()
    run(task, plain)
    evaluate(task, odd, tokenizer, max_length=1000)
    assert plain.asked == odd.asked
    assert tokenizer.truncation is not None  # the caller's own is left alone


def instance(*arguments: str, doc_id: int = 0) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0, ("made-up", doc_id, 1))


def scorer_lm(scorer: TableScorer, tokenizer: Any = TOKENIZER, max_length: int = 1000, **kwargs: Any) -> Any:
    from wdmoe.bs.harness import ScorerLM

    return ScorerLM(scorer, tokenizer, max_length, **kwargs)


def test_spaces_at_the_end_of_the_context_move_to_the_continuation() -> None:
    scorer = TableScorer()
    scorer_lm(scorer).loglikelihood([instance("a \n", "b")])
    (choice,) = scorer.asked[0].choices
    assert (decode(choice.context), decode(choice.continuation)) == ("a", " \nb")


def test_answers_find_their_requests_in_any_order() -> None:
    requests = [instance("q", text, doc_id=doc_id) for text, doc_id in [("a", 1), ("bb", 0), ("ccc", 1)]]
    scorer = TableScorer()
    assert scorer_lm(scorer).loglikelihood(requests) == [(-1.0, True), (-2.0, True), (-3.0, True)]
    assert [(question.name, len(question.choices)) for question in scorer.asked] == [
        ("made-up/1", 2),
        ("made-up/0", 1),
    ]


def test_special_tokens_are_added_only_by_the_tokenizer_itself_and_only_once() -> None:
    tokenizer = byte_tokenizer(bos=True)
    scorer = TableScorer()
    texts = ["a", f"{BOS}a", ""]
    scorer_lm(scorer, tokenizer).loglikelihood([instance(text, "b", doc_id=i) for i, text in enumerate(texts)])
    contexts = [decode(question.choices[0].context, tokenizer) for question in scorer.asked]
    assert contexts == [f"{BOS}a", f"{BOS}a", BOS]
    assert all(decode(question.choices[0].continuation) == "b" for question in scorer.asked)


def test_an_empty_context_needs_a_prefix_token() -> None:
    with pytest.raises(ValueError, match="needs prefix_token_id, the model's BOS or EOS"):
        scorer_lm(TableScorer()).loglikelihood([instance("", "b")])
    scorer = TableScorer()
    scorer_lm(scorer, prefix_token_id=7).loglikelihood([instance("", "b")])
    assert scorer.asked[0].choices[0].context == (7,)


def test_a_request_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match=r"made-up/0: context 'a' with continuation '' becomes 1 \+ 0 tokens"):
        scorer_lm(TableScorer()).loglikelihood([instance("a", "")])


def test_rolling_scores_each_token_once_in_windows() -> None:
    announced: list[None] = []
    scorer = TableScorer()
    lm = scorer_lm(scorer, max_length=4, prefix_token_id=0, on_question=lambda: announced.append(None))
    assert lm.loglikelihood_rolling([instance("abcdefghij"), instance("xyz", doc_id=1)]) == [-10.0, -3.0]
    first = [question.choices[0] for question in scorer.asked[:3]]
    assert [decode(choice.continuation) for choice in first] == ["abcd", "efgh", "ij"]
    assert [decode(choice.context) for choice in first] == [decode([0]), "d", "fgh"]
    assert scorer.asked[2].name == "made-up/0 window 2"
    assert len(announced) == 2


def test_whole_texts_are_read_in_windows_of_2048_tokens_at_most() -> None:
    windows = scorer_lm(TableScorer(), max_length=9000, prefix_token_id=0).windows("text", "x" * 5000)
    assert [len(window.choices[0].continuation) for window in windows] == [2048, 2048, 904]
    assert max(len(w.choices[0].context) + len(w.choices[0].continuation) for w in windows) == 2049


def test_generation_is_refused() -> None:
    with pytest.raises(ValueError, match="task made-up asks the model to write text, which is not supported yet"):
        scorer_lm(TableScorer()).generate_until([instance("a", "b")])


def test_the_bundled_sample_goes_by_its_own_name() -> None:
    task = load_task("piqa-sample")
    scorer = TableScorer()
    evaluation = run(task, scorer, limit=2)
    assert (evaluation.dataset, evaluation.source, evaluation.rows) == ("piqa-sample", "bundled sample", 2)
    assert [question.name for question in scorer.asked] == ["piqa-sample/0", "piqa-sample/1"]


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'pica' is not known; known are: piqa, piqa-sample"):
        load_task("pica")


def test_without_the_hub_piqa_fails_at_once_and_names_the_ways_out(tmp_path: Path) -> None:
    code = "from wdmoe.bs.evaluation import load_task; load_task('piqa')"
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Retrying" not in done.stderr
        assert time.monotonic() - start < 20  # `datasets` alone takes 23 s and more; this takes 2
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("wdmoe.runtime.errors.DataError: the rows of piqa (baber/piqa) cannot be had")
        assert "--data-dir DIR with DIR/piqa/valid.jsonl and DIR/piqa/valid-labels.lst" in message
        assert "--dataset piqa-sample" in message


@pytest.mark.parametrize("missing", ["lm_eval", "datasets"])
def test_a_missing_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(WdmoeError, match=r"pip install 'wdmoe\[eval\]'"):
        load_task("piqa-sample")


@pytest.mark.slow
def test_any_scorer_over_the_same_model_equals_hflm(task: LoadedTask) -> None:
    """The tokens, the truncation and the windows are HFLM's: only then is a comparison with it one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    tokenizer = byte_tokenizer(bos=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).eval()

    class ModelScorer(TableScorer):
        def score(
            self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
        ) -> list[Answer]:
            return [self._answer(question) for question in questions]

        def _answer(self, question: Question) -> Answer:
            values, greedy = [], []
            for choice in question.choices:
                tokens = torch.tensor([choice.context + choice.continuation])
                targets = tokens[0, len(choice.context) :]
                with torch.no_grad():
                    logits = model(tokens[:, :-1]).logits[0, len(choice.context) - 1 :].log_softmax(-1)
                values.append(float(logits.gather(1, targets[:, None]).sum()))
                greedy.append(bool((logits.argmax(-1) == targets).all()))
            return Answer(tuple(values), tuple(greedy))

    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)
    for max_length in (64, 40):  # 40 is shorter than most prompts here
        hflm = HFLM(pretrained=model, tokenizer=wrapped, max_length=max_length, batch_size=1, add_bos_token=True)
        theirs = evaluate_lm(hflm, task)
        ours = evaluate(task, ModelScorer(), tokenizer, max_length=max_length)
        assert ours.correct == theirs.correct
        for got, expected in zip(ours.log_likelihoods, theirs.log_likelihoods, strict=True):
            assert got == pytest.approx(expected, rel=1e-5)

        lm = scorer_lm(ModelScorer(), tokenizer, max_length)
        pairs = [instance("a b ", "c"), instance("", "only this"), instance(f"{BOS}x", " y")]
        assert flat(lm.loglikelihood(pairs)) == pytest.approx(flat(hflm.loglikelihood(pairs)), rel=1e-5)
        text = [instance("A text longer than two windows of forty and of sixty-four tokens. " * 3)]
        assert lm.loglikelihood_rolling(text) == pytest.approx(hflm.loglikelihood_rolling(text), rel=1e-5)


def flat(scores: Sequence[tuple[float, bool]]) -> list[float]:
    return [float(value) for score in scores for value in score]
