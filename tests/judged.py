"""A scorer and a tokenizer so simple that what the judge asks can be read, and what it makes of the answers be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from wdmoe.bs.questions import Answer, Choice, Question

BOS = "<s>"


def byte_tokenizer(bos: bool = False) -> Any:
    """One token per byte, so that decoding gives back exactly what was encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.add_special_tokens([BOS])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer


TOKENIZER = byte_tokenizer()


def decode(tokens: Sequence[int], tokenizer: Any = TOKENIZER) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
    return text


class TableScorer:
    """Answers by a function of the decoded continuation, last question first, and keeps what it was asked."""

    def __init__(self, log_likelihood: Callable[[str], float] = lambda text: -float(len(text))) -> None:
        self.log_likelihood = log_likelihood
        self.asked: list[Question] = []

    def score(
        self, questions: Sequence[Question], on_answer: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        self.asked.extend(questions)
        answers = []
        for question in questions:
            values = tuple(self.log_likelihood(decode(choice.continuation)) for choice in question.choices)
            answers.append(Answer(values, tuple(value > -9.5 for value in values)))
        for index in reversed(range(len(questions))):
            if on_answer is not None:
                on_answer(index, answers[index])
        return answers


def prompts(questions: Sequence[Question]) -> list[list[tuple[str, str]]]:
    def text(choice: Choice) -> tuple[str, str]:
        return decode(choice.context), decode(choice.continuation)

    return [[text(choice) for choice in question.choices] for question in questions]
