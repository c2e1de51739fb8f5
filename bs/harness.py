"""The two classes that wdmoe hangs into lm-evaluation-harness: a task with our rows, a model over our scorer.

This module imports lm-eval, which takes about a second: it is imported inside functions only.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask

# NOTE: a private module of lm-eval 0.4.13; the public TaskManager reads some ten thousand YAML files to find one,
# and builds (so downloads) the task before its rows could be replaced.
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, hash_string, make_disjoint_window

from wdmoe.bs.questions import Answer, Choice, Question, Scorer
from wdmoe.bs.rows import Row, find_dataset
from wdmoe.runtime.errors import DataError, EngineError

_logger = logging.getLogger(__name__)

# Tokens of a whole text that are looked at together, at most; the memory that attention takes grows with the square.
# lm-eval's HFLM gives the same numbers with `max_length` no larger than this.
MAX_WINDOW = 2048


class RowsTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval ships no types
    """A task of lm-eval as it stands, prompt, choices and metrics, with only its rows replaced.

    Args:
        dataset: a name in `wdmoe.bs.rows.DATASETS`; the task goes by it in questions and results.
        rows: in the task's own schema; None fetches the task's own rows from the Hugging Face hub.
    """

    def __init__(self, dataset: str, rows: Sequence[Row] | None) -> None:
        self._rows = rows
        self._docs: Any = None
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / find_dataset(dataset).task_file)
        config["task"] = dataset
        if rows is not None:
            # Only the split that is scored exists; lm-eval prefers test to validation as well.
            scored = "test_split" if config.get("test_split") else "validation_split"
            for split in {"training_split", "validation_split", "test_split", "fewshot_split"} - {scored}:
                config[split] = None
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put our rows where lm-eval would put what it downloads."""
        if self._rows is not None:
            split = self.config.test_split or self.config.validation_split
            self.dataset = {split: datasets.Dataset.from_list(list(self._rows))}
            return
        # `datasets` retries for 23 s before it gives up, so ask first. Where the user has declared to be offline,
        # it reads its cache and fails at once by itself.
        hub = datasets.config.HF_ENDPOINT
        if not datasets.config.HF_HUB_OFFLINE and not _reachable(hub):
            raise DataError(self._hub_advice(f"{hub} cannot be reached"))
        try:
            super().download(dataset_kwargs, **kwargs)
        except OSError as error:
            raise DataError(self._hub_advice(str(error))) from error

    @property
    def eval_docs(self) -> Any:
        """As in lm-eval, but what its `process_docs` makes of the rows is made once, and without a progress bar."""
        if self._docs is None:
            with quiet():
                self._docs = super().eval_docs
        return self._docs

    def build_all_requests(self, **kwargs: Any) -> None:
        """As in lm-eval, without its progress bar, which cannot be turned off otherwise."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**kwargs)

    def _hub_advice(self, reason: str) -> str:
        name = self.config.task
        files = " and ".join(f"DIR/{name}/{file}" for file in find_dataset(name).files)
        return (
            f"the rows of {name} ({self.config.dataset_path}) cannot be had from the Hugging Face hub: {reason}. "
            f"Pass --data-dir DIR with {files}, or take --dataset piqa-sample, which comes with wdmoe. "
            f"HF_HUB_OFFLINE=1 uses a copy that is in the Hugging Face cache"
        )


class ScorerLM(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """A model of lm-eval that hands tokens to a `Scorer`; tokens as lm-eval's own `HFLM` makes them.

    Args:
        scorer: answers the questions.
        tokenizer: a `tokenizers.Tokenizer`; special tokens are added only by its own post-processor.
        max_length: positions the model can see; longer prompts lose their first tokens.
        on_question: called once for each row as it is answered.
        prefix_token_id: what stands before the first token where there is no context, the model's BOS or else
            its EOS; by default the token that the tokenizer itself puts first.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Any,
        max_length: int,
        on_question: Callable[[], None] | None = None,
        prefix_token_id: int | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; expected at least 1")
        super().__init__()
        if tokenizer.truncation is not None or tokenizer.padding is not None:
            # A tokenizer.json may ask for both; transformers ignores it, and so do we, on a copy.
            tokenizer = type(tokenizer).from_str(tokenizer.to_str())
            tokenizer.no_truncation()
            tokenizer.no_padding()
        if prefix_token_id is None:
            prefix_token_id = next(iter(tokenizer.encode("").ids), None)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._scorer = scorer
        self._on_question = on_question or (lambda: None)
        self._prefix_token_id = prefix_token_id
        self._prefix_text = None if prefix_token_id is None else tokenizer.id_to_token(prefix_token_id)

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context."""
        if self._prefix_token_id is None:
            raise ValueError("a text without context needs prefix_token_id, the model's BOS or EOS token")
        return self._prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids; the tokenizer adds its special tokens unless the text starts with them."""
        if add_special_tokens is None:
            add_special_tokens = not (self._prefix_text and string.startswith(self._prefix_text))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score each request; the requests of one row travel as one question."""
        members: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            members.setdefault(f"{request.task_name}/{request.doc_id}", []).append(index)
        shortened = 0
        questions = []
        for name, indices in members.items():
            choices = []
            for index in indices:
                context, continuation = self._encode(name, *requests[index].args)
                kept = (context + continuation)[-(self.max_length + 1) :]
                shortened += len(kept) < len(context) + len(continuation)
                split = len(kept) - len(continuation)
                choices.append(Choice(tuple(kept[:split]), tuple(kept[split:])))
            questions.append(Question(name, tuple(choices)))
        if shortened:
            _logger.warning(
                "%d of %d choices are longer than the model's %d positions and lose their first tokens",
                *(shortened, len(requests), self.max_length),
            )

        scores: dict[int, tuple[float, bool]] = {}
        answers = self._answers(questions, lambda _: self._on_question())
        for indices, answer in zip(members.values(), answers, strict=True):
            scores.update(zip(indices, zip(answer.log_likelihoods, answer.greedy, strict=True), strict=True))
        return [scores[index] for index in range(len(requests))]

    def windows(self, name: str, text: str) -> list[Question]:
        """Cut a whole text into windows, so that each token is scored once."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=min(self.max_length, MAX_WINDOW),
            context_len=1,
        )
        disjoint = (make_disjoint_window(window) for window in windows)
        return [
            Question(f"{name} window {number}", (Choice(tuple(context), tuple(continuation)),))
            for number, (context, continuation) in enumerate(disjoint)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Score whole texts in windows, each token once."""
        questions: list[Question] = []
        owners: list[int] = []  # of each window, the index of its request
        for owner, request in enumerate(requests):
            (text,) = request.args
            windows = self.windows(f"{request.task_name}/{request.doc_id}", text)
            questions += windows
            owners += [owner] * len(windows)

        left = Counter(owners)

        def on_window(index: int) -> None:
            left[owners[index]] -= 1
            if not left[owners[index]]:
                self._on_question()

        totals = [0.0] * len(requests)
        for owner, answer in zip(owners, self._answers(questions, on_window), strict=True):
            totals[owner] += answer.log_likelihoods[0]
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Refuse: a scorer scores, it does not write."""
        raise ValueError(
            f"task {requests[0].task_name} asks the model to write text, which is not supported yet; "
            f"expected a task whose choices are scored, such as piqa"
        )

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("`loglikelihood` needs the row of each request, which is lost here")

    def _encode(self, name: str, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            first, second = self._encode_pair(context, continuation)
        else:
            first, second = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if second[:1] == first:
                second = second[1:]
        if not first or not second:
            raise DataError(
                f"{name}: context {context!r} with continuation {continuation!r} becomes {len(first)} + {len(second)} "
                f"tokens; expected at least one each"
            )
        if len(second) > self.max_length:
            raise DataError(
                f"{name}: a choice of {len(second)} tokens does not fit the model's {self.max_length} positions"
            )
        return first, second

    def _answers(self, questions: list[Question], on_answer: Callable[[int], None]) -> list[Answer]:
        answers = self._scorer.score(questions, lambda index, _: on_answer(index))
        for question, answer in zip(questions, answers, strict=True):
            if any(map(math.isnan, answer.log_likelihoods)):
                raise EngineError(
                    f"{question.name}: the model's log-likelihoods are {answer.log_likelihoods}, not all of them numbers; "
                    f"an overflow in half precision is the usual cause"
                )
        return answers


def row_hashes(task: ConfigurableTask, rows: int) -> list[str]:
    """Hash the first rows of a task and their targets, as lm-eval does in its samples."""

    def row_hash(row: Any) -> str:
        text = json.dumps(row, indent=2, default=handle_non_serializable, ensure_ascii=False)
        return f"{hash_string(text)} {hash_string(str(task.doc_to_target(row)))}"

    return [row_hash(row) for row in itertools.islice(task.eval_docs, rows)]


def is_mean(task: ConfigurableTask, metric: str) -> bool:
    """Whether a metric is the mean of one value per row, as every accuracy is."""
    return task.aggregation()[metric] is mean


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's logs below errors to itself, and the progress bars of `datasets`."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _reachable(url: str, timeout_s: float = 4.0) -> bool:
    """Whether anything answers at `url` in time; on a thread because a name look-up has no time limit of its own."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
                answers.put(True)
        except urllib.error.HTTPError:
            answers.put(True)
        except OSError as error:
            # Certificates are for the download itself to judge: it may know others than the standard library.
            answers.put(isinstance(getattr(error, "reason", None), ssl.SSLError))

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return False
