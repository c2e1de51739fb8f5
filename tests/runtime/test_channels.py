from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from wdmoe.runtime.channels import Channel, OwnChannel, SharedChannel
from wdmoe.runtime.errors import WdmoeError

Make = Callable[[Path], Channel]


@pytest.mark.parametrize(
    "make", [lambda _: OwnChannel(), lambda path: SharedChannel(path / "c")], ids=["own", "shared"]
)
def test_a_channel_never_carries_two_at_a_time_and_never_idles_before_it_must(make: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    channel, now_s = make(tmp_path), 0.0
    taken: list[tuple[float, float]] = []
    for _ in range(300):
        now_s += float(rng.exponential(1.0))
        duration_s, ready_s = float(rng.exponential(0.6)), now_s + float(rng.exponential(2.0))
        start_s = channel.reserve(now_s, ready_s, duration_s)
        assert start_s >= ready_s
        if start_s > ready_s:  # then something ends just there
            assert min(abs(end_s - start_s) for _, end_s in taken) < 1e-9
        taken.append((start_s, start_s + duration_s))
    assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(sorted(taken)))


def test_two_that_open_the_same_file_see_each_other(tmp_path: Path) -> None:
    one, other = SharedChannel(tmp_path / "c"), SharedChannel(tmp_path / "c")
    assert one.reserve(0.0, 0.0, 2.0) == 0.0
    assert other.reserve(0.0, 1.0, 2.0) == 2.0
    assert one.reserve(3.5, 3.5, 1.0) == 4.0
    assert other.reserve(900.0, 900.0, 1.0) == 900.0
    assert (tmp_path / "c").stat().st_size == 16  # what is over is forgotten


def test_what_an_earlier_start_of_the_machine_left_is_forgotten(tmp_path: Path) -> None:
    SharedChannel(tmp_path / "c").reserve(1e6, 1e6, 5.0)
    assert SharedChannel(tmp_path / "c").reserve(10.0, 10.0, 1.0) == 10.0


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("buy milk")
    with pytest.raises(WdmoeError, match="notes is not a channel"):
        SharedChannel(tmp_path / "notes")
    with pytest.raises(WdmoeError, match="cannot open the channel"):
        SharedChannel(tmp_path / "no" / "c")
