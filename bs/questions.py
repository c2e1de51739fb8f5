"""What is asked of the model and what it answers: the nouns between evaluation and scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation to be scored under its context; both are token ids, both hold at least one."""

    context: TokenIds
    continuation: TokenIds


@dataclass(frozen=True, slots=True)
class Question:
    """Choices that are scored together, so that what they share is computed once."""

    name: str  # for example "piqa/17"; shows in errors and logs
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The scores of one question's choices, in their order."""

    log_likelihoods: tuple[float, ...]  # sum over the continuation's tokens, natural logarithm
    greedy: tuple[bool, ...]  # whether each token of the continuation was the most likely one


class Scorer(Protocol):
    """Whatever can answer questions: the distributed model, or a table in a test."""

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Return one answer per question, in order.

        Args:
            questions: what to score.
            on_answer: called with the index and the answer as each question is done, in any order.
        """
        ...
