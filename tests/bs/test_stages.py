"""What the base station computes itself."""

from __future__ import annotations

import numpy as np

from wdmoe.bs.stages import best_and_log_sum


def test_log_probabilities_keep_their_digits_over_a_large_vocabulary() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((30, 49_152)) * 4 + 10).astype(np.float32)
    best, log_sum = best_and_log_sum(logits)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)) + wide.max(axis=1)
    np.testing.assert_allclose(log_sum, expected, rtol=0, atol=2e-6)
    assert abs(float((log_sum - expected).mean())) < 5e-7  # an answer of many tokens adds a bias up
    np.testing.assert_array_equal(best, wide.argmax(axis=1))
