"""Every expert has one device; the last device takes what is left over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from wdmoe.export.placement import (
    PlacementOptions,
    device_count,
    placement_of,
    split_over_devices,
    split_per_device,
)
from wdmoe.runtime.errors import BundleError


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"devices": [[0, 2], [1], [1]]}'),
        ("p.json", '{"placement": [[[0], [2, 1], [0]], [[0], [1, 2], [0]]]}'),
        pytest.param(
            "p.toml", "devices = [[0, 2], [1], [1]]",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib"),
        ),
    ],
)  # fmt: skip
def test_a_placement_is_read_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert PlacementOptions(file=tmp_path / name).place(2, 3) == (((0,), (1, 2), (0,)),) * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected one field"),
        ('{"placement": 3}', "expected one field"),
        ('{"placement": {"0": [[0]]}}', "expected one field"),
        ('{"devices": 3}', "expected one field"),
        ('{"devices": [[0, 1, 3]]}', "expert 3 is outside the model"),
        ('{"devices": [[0, 1]]}', "expert 2 of block 0 has the devices"),
        ('{"devices": [[0, 1, 2], []]}', None),
        ('{"placement": [[[0], [0], [0]]]}', "is not 2 blocks x 3 experts"),
        ('{"placement": [[[0], [0], [2]], [[0], [0], [0]]]}', "without a gap"),
        ('{"placement": [[[0], [0], [0, 0]], [[0], [0], [0]]]}', "expert 2 of block 0"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "p.json").write_text(text)
    if message is None:
        assert PlacementOptions(file=tmp_path / "p.json").place(2, 3) == (((0,),) * 3,) * 2
        return
    with pytest.raises(BundleError, match=message):
        PlacementOptions(file=tmp_path / "p.json").place(2, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"experts_per_device": 2, "devices": 4},
        {"file": Path("p.json"), "devices": 2},
        {"file": Path("p.json"), "balance": True},
        {"speeds": (1.0, 2.0)},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|are for"):
        PlacementOptions(**options)


def test_speeds_say_how_many_devices_there_are() -> None:
    assert device_count(PlacementOptions(balance=True, speeds=(1.0, 2.0)).place(2, 8)) == 2
    with pytest.raises(ValueError, match="2 speeds for 4 devices"):
        PlacementOptions(balance=True, devices=4, speeds=(1.0, 2.0)).place(2, 8)
