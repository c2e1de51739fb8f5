from __future__ import annotations

import numpy as np
import pytest

from wdmoe.runtime.departures import Departures, Pace


@pytest.mark.parametrize("seed", range(5))
def test_a_share_is_never_exceeded_over_any_window_and_the_order_is_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ready_s = np.cumsum(rng.exponential(0.05, 60) * rng.integers(0, 2, 60))
    link_s = rng.uniform(0.001, 0.05, 60)  # what each takes of the whole link
    share, pace = float(rng.uniform(0.1, 0.9)), Pace()
    leaves_s = np.array([pace.leave_s(r, s, share) for r, s in zip(ready_s, link_s, strict=True)])
    there_s = leaves_s + link_s
    assert (leaves_s >= ready_s).all() and (np.diff(leaves_s) > 0).all()
    carried = np.concatenate(([0.0], np.cumsum(link_s)))
    for first in range(60):
        opened_s = there_s[first - 1] if first else ready_s[0]
        for last in range(first, 60):
            assert carried[last + 1] - carried[first] <= share * (there_s[last] - opened_s) + 1e-9
    assert there_s[0] == pytest.approx(ready_s[0] + link_s[0] / share)


def test_nothing_is_saved_up_while_nothing_is_sent_and_the_whole_link_holds_nothing_back() -> None:
    pace = Pace()
    assert pace.leave_s(0.0, 1.0, 0.5) == 1.0
    assert pace.leave_s(100.0, 1.0, 0.5) == 101.0
    assert pace.leave_s(200.0, 1.0, 1.0) == 200.0
    assert pace.leave_s(200.0, 1.0, 1.0) == 201.0  # behind the one before


def test_departures_go_in_their_order_and_say_how_long_to_sleep() -> None:
    held: Departures[str] = Departures()
    assert held.wait_s(0.0, 9.0) == 9.0
    for item, at_s in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        held.hold(item, at_s)
    assert held.wait_s(0.0, 9.0, 0.25) == 0.75 and held.wait_s(0.9, 9.0, 0.25) == 0.0 and held.wait_s(0.0, 0.5) == 0.5
    assert list(held.due(0.5)) == [] and list(held.due(2.0)) == ["a", "b", "c"]
    assert held.next_s == float("inf")
