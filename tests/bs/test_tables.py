"""Tables fit the terminal, and no name of a policy is broken within a word."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from wdmoe.bs.records import BlockRecord
from wdmoe.bs.tables import simulation_table

LONG = "bottleneck:renormalise=False,loss=0.0075"
LONGER = f"bottleneck:protect=False,budget={'/'.join(['0.05'] * 12)},importance=weight"


def shown(names: list[str], width: int) -> list[str]:
    entries = [
        {
            "policy": name, "questions": 3, "latency_mean_ms": 123_456.0, "latency_p50_ms": 123_456.0,
            "latency_p95_ms": 123_456.0, "dropped_share": 0.5, "gate_mass_dropped": 0.25,
        }
        for name in names
    ]  # fmt: skip
    result = {
        "devices": {"orin-nx-8gb": 4}, "results": entries, "channel": "shared", "bandwidth": None, "model": {"name": "m"}
    }  # fmt: skip
    console = Console(width=width)
    with console.capture() as capture:
        console.print(simulation_table(result))
    return capture.get().splitlines()


def test_a_name_without_room_has_a_line_of_its_own_above_its_figures() -> None:
    lines = shown(["exact", LONG], 80)
    assert max(map(len, lines)) <= 80
    at = lines.index(LONG)
    assert lines[at + 1].startswith(" ") and "123456" in lines[at + 1] and lines[at - 1].startswith("exact ")
    (wide,) = (line for line in shown(["exact", LONG], 140) if line.startswith(LONG))
    assert "123456" in wide  # here there is room


def test_a_name_longer_than_a_line_is_broken_between_its_options() -> None:
    lines = [line.rstrip() for line in shown(["exact", LONGER, LONG], 80)]
    at = next(n for n, line in enumerate(lines) if line.startswith("bottleneck:protect"))
    assert "".join(line.strip() for line in lines[at : at + 2]) == LONGER and lines[at].endswith("/")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [10, 30, 50])
def test_a_narrow_terminal_is_no_trouble(width: int) -> None:
    assert LONG in "".join(line.strip() for line in shown([LONG, ""], width))


def test_a_table_with_names_is_a_table_for_those_who_read_its_cells() -> None:
    table = next(part for part in simulation_table_parts() if isinstance(part, Table))
    assert list(table.columns[0].cells) == [LONG]


def simulation_table_parts() -> list[object]:
    entry = {"policy": LONG, "questions": 1} | dict.fromkeys(
        ("latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "dropped_share", "gate_mass_dropped"), 1.0
    )
    result = {"devices": {"d": 1}, "results": [entry], "channel": "shared", "bandwidth": None, "model": {"name": "m"}}
    return list(simulation_table(result).renderables)


def test_the_parts_of_a_block_are_those_of_the_request_that_took_longest() -> None:
    record = BlockRecord(1, 0, 1, 1.0, 0.0, None, None)
    record.on_answer(compute_ms=9.0, queue_ms=0.0, air_ms=1.0)
    record.on_answer(compute_ms=1.0, queue_ms=7.0, air_ms=5.0)
    record.on_answer(compute_ms=2.0, queue_ms=2.0, air_ms=8.0)
    assert (record.device_ms, record.queue_ms, record.air_ms) == (1.0, 7.0, 5.0)
