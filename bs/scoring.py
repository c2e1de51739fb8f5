"""Answers questions with the distributed model: packs, runs, sums up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wdmoe.bs.microbatch import answer_of, pack_question
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Policy
from wdmoe.bs.questions import Answer, Question
from wdmoe.bs.records import Record


class DistributedScorer:
    """A `Scorer` over the pipeline, under one policy; keeps a record of every question."""

    def __init__(self, pipeline: Pipeline, policy: Policy, in_flight: int, window: int | None) -> None:
        self.records: list[Record] = []
        self._pipeline = pipeline
        self._policy = policy
        self._in_flight = in_flight
        self._window = window  # of the model's attention

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Return one answer per question, in order; see `Scorer`."""
        answers: dict[int, Answer] = {}
        microbatches = (pack_question(question, self._window) for question in questions)
        for number, result, record in self._pipeline.run(microbatches, self._policy, self._in_flight):
            answers[number] = answer_of(questions[number], result)
            self.records.append(record)
            if on_answer is not None:
                on_answer(number, answers[number])
        return [answers[number] for number in range(len(questions))]
