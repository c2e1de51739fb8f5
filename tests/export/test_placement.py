"""Every expert has one device; the last device takes what is left over."""

from __future__ import annotations

import pytest

from wdmoe.export.placement import placement_of, split_over_devices, split_per_device


@pytest.mark.parametrize(
    ("n_experts", "each", "sizes"),
    [(8, 2, [2, 2, 2, 2]), (8, 3, [3, 3, 2]), (8, 8, [8]), (5, 4, [4, 1]), (3, 1, [1] * 3)],
)
def test_so_many_experts_per_device(n_experts: int, each: int, sizes: list[int]) -> None:
    groups = split_per_device(n_experts, each)
    assert [len(group) for group in groups] == sizes
    assert [expert for group in groups for expert in group] == list(range(n_experts))


@pytest.mark.parametrize(
    ("n_experts", "devices", "sizes"), [(8, 4, [2, 2, 2, 2]), (8, 3, [2, 2, 4]), (8, 1, [8]), (5, 4, [1, 1, 1, 2])]
)
def test_so_many_devices(n_experts: int, devices: int, sizes: list[int]) -> None:
    groups = split_over_devices(n_experts, devices)
    assert [len(group) for group in groups] == sizes
    assert [expert for group in groups for expert in group] == list(range(n_experts))


@pytest.mark.parametrize("number", [0, 9])
def test_a_number_outside_the_model_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        split_per_device(8, number)
    with pytest.raises(ValueError, match="1 to 8"):
        split_over_devices(8, number)


def test_the_placement_is_the_same_in_every_block() -> None:
    assert placement_of((range(2), range(2, 3)), 2) == (((0,), (0,), (1,)),) * 2
