from __future__ import annotations

import pytest

from wdmoe.profiles.base_station import modelled_station, station_names


@pytest.mark.parametrize("name", station_names())
def test_every_base_station_names_its_sources(name: str) -> None:
    station = modelled_station(name)
    assert station.memory_bytes >= 10**9
    assert len(station.sources) == 4
    assert all(": " in line for line in station.sources)


def test_a_graph_is_bound_by_memory_for_few_rows_and_by_arithmetic_for_many() -> None:
    station = modelled_station("laptop-8-core")
    weights = 40_000_000
    reading_ms = 4 * weights / (76.8e6 * 0.7)
    assert station.graph_ms(weights, 1) == pytest.approx(0.1 + reading_ms)
    assert station.graph_ms(weights, 1, extra_bytes=76.8e6 * 0.7) == pytest.approx(0.1 + reading_ms + 1)
    assert station.graph_ms(weights, 1000) == pytest.approx(0.1 + 2 * weights * 1000 / (0.77e9 * 0.7))


def test_an_unknown_base_station_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'toaster'; expected one of laptop-8-core"):
        modelled_station("toaster")
