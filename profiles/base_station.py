"""Base stations that nobody here has measured: a roofline over published figures, as for the devices of `modelled.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgspec

from wdmoe.profiles.device_profile import Positive


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    memory_gb: tuple[Positive, str]  # value and source, in all three
    bandwidth_gb_per_s: tuple[Positive, str]
    fp32_tflops: tuple[Positive, str]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    efficiency: tuple[Positive, str]  # of memory and of arithmetic
    call_overhead_ms: tuple[Positive, str]
    stations: dict[str, _Entry]


@dataclass(frozen=True, slots=True)
class BaseStation:
    """A machine that runs the stages, in float32."""

    name: str
    memory_bytes: int
    bytes_per_ms: float  # that its memory really gives
    flops_per_ms: float
    overhead_ms: float  # of one graph
    sources: tuple[str, ...]

    def graph_ms(self, weights: int, rows: int, extra_flops: float = 0.0, extra_bytes: float = 0.0) -> float:
        """Predict the time of a graph: overhead + max(bytes / bandwidth, operations / rate).

        Args:
            weights: float32 numbers that it multiplies with, each read once.
            rows: each multiplied with all of them.
            extra_flops: of what has no weights.
            extra_bytes: that it reads besides.
        """
        reading_ms = (4 * weights + extra_bytes) / self.bytes_per_ms
        return self.overhead_ms + max(reading_ms, (2 * weights * rows + extra_flops) / self.flops_per_ms)


def station_names() -> tuple[str, ...]:
    """Return the names that `modelled_station` takes."""
    return tuple(_table().stations)


def modelled_station(name: str) -> BaseStation:
    """Return a base station of the table.

    Raises:
        ValueError: no such base station; names those there are.
    """
    table = _table()
    if name not in table.stations:
        raise ValueError(f"no modelled base station is called {name!r}; expected one of {', '.join(table.stations)}")
    entry, efficiency = table.stations[name], table.efficiency[0]
    cited = {
        f"memory {entry.memory_gb[0]:g} GB": entry.memory_gb[1],
        f"bandwidth {entry.bandwidth_gb_per_s[0]:g} GB/s": entry.bandwidth_gb_per_s[1],
        f"float32 {entry.fp32_tflops[0]:g} TFLOP/s": entry.fp32_tflops[1],
        f"efficiency {efficiency:g}, overhead {table.call_overhead_ms[0]:g} ms": table.efficiency[1],
    }
    return BaseStation(
        entry.name,
        int(entry.memory_gb[0] * 1e9),
        entry.bandwidth_gb_per_s[0] * 1e6 * efficiency,
        entry.fp32_tflops[0] * 1e9 * efficiency,
        table.call_overhead_ms[0],
        tuple(f"{value}: {table.sources[key]}" for value, key in cited.items()),
    )


@cache
def _table() -> _Table:
    return msgspec.json.decode((files("wdmoe.profiles") / "stations.json").read_bytes(), type=_Table)
