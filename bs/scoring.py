"""Answers questions with the distributed model: packs, runs, sums up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wdmoe.bs.config import InFlight
from wdmoe.bs.microbatch import answers_of, in_batches, pack_questions
from wdmoe.bs.pipeline import Pipeline
from wdmoe.bs.policies import Policy
from wdmoe.bs.questions import Answer, Question
from wdmoe.bs.records import Record


class DistributedScorer:
    """A `Scorer` over the pipeline, under one policy; keeps a record of every microbatch."""

    def __init__(
        self, pipeline: Pipeline, policy: Policy, in_flight: InFlight, window: int | None, batch: int = 1
    ) -> None:
        self.records: list[Record] = []
        self._pipeline = pipeline
        self._policy = policy
        self._in_flight = in_flight
        self._window = window  # of the model's attention
        self._batch = batch  # questions in a microbatch

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """Return one answer per question, in order; see `Scorer`."""
        answers: dict[int, Answer] = {}
        batches = [(numbers, [questions[k] for k in numbers]) for numbers in in_batches(questions, self._batch)]
        microbatches = (pack_questions(asked, self._window) for _, asked in batches)
        for number, result, record in self._pipeline.run(microbatches, self._policy, self._in_flight):
            numbers, asked = batches[number]
            self.records.append(record)
            for k, answer in zip(numbers, answers_of(asked, result), strict=True):
                answers[k] = answer
                if on_answer is not None:
                    on_answer(k, answer)
        return [answers[number] for number in range(len(questions))]
