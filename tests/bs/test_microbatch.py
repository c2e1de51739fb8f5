"""How questions are laid out: lanes, masks, batches of like length."""

from __future__ import annotations

import numpy as np

from wdmoe.bs.microbatch import in_batches, pack_questions
from wdmoe.bs.questions import Choice, Question


def question(name: str, context: int, *continuations: int) -> Question:
    """Make a question of so many tokens, the choices' first tokens all different."""
    choices = (Choice(tuple(range(1, context + 1)), (100 + k, *range(n - 1))) for k, n in enumerate(continuations))
    return Question(name, tuple(choices))


def test_each_question_is_a_lane_and_sees_nothing_of_the_others() -> None:
    questions = [question("a", 3, 2, 2), question("b", 5, 1, 3)]
    both = pack_questions(questions, None)
    apart = [pack_questions([one], None) for one in questions]
    n = [len(one.token_ids) for one in apart]
    assert both.questions == 2 and len(both.token_ids) == sum(n)
    assert both.lanes.shape == (2, max(n)) and both.mask.shape == (2, 1, max(n), max(n))
    np.testing.assert_array_equal(both.lanes.ravel()[both.back], np.arange(sum(n)))
    for k, one in enumerate(apart):
        np.testing.assert_array_equal(both.mask[k, :, : n[k], : n[k]], one.mask[0])
        assert np.isneginf(both.mask[k, 0, : n[k], n[k] :]).all()
    assert not np.isneginf(both.mask).all(axis=-1).any()  # a softmax over nothing would be NaN
    np.testing.assert_array_equal(both.target_ids, np.concatenate([one.target_ids for one in apart]))
    predicted = both.head_rows[both.target_rows]
    first = apart[0].head_rows[apart[0].target_rows]
    second = apart[1].head_rows[apart[1].target_rows] + n[0]
    np.testing.assert_array_equal(predicted, np.concatenate([first, second]))


def test_batches_hold_questions_of_like_length_and_not_too_many_rows() -> None:
    sizes = [10, 400, 12, 700, 11, 500, 13, 5000]
    questions = [question(f"q/{n}", size, 1) for n, size in enumerate(sizes)]
    assert in_batches(questions, 1) == [(n,) for n in range(len(sizes))]
    batches = in_batches(questions, 3)
    assert sorted(n for batch in batches for n in batch) == list(range(len(sizes)))
    assert batches == [(7,), (3,), (5, 1, 6), (2, 4, 0)]
    assert in_batches([], 4) == []
