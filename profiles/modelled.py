"""Profiles of devices that nobody here has measured: a roofline over the published figures of Jetson modules.

    time(n) = overhead + max(weight_bytes / (bandwidth x e_m), n x flops / (peak x e_c))

The median takes the planning efficiencies, the p95 the low ends of their ranges. A modelled profile is an estimate for
planning and emulation, never a measurement; its `origin` says so wherever it goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgspec

from wdmoe.profiles.device_profile import VERSION, Count, DeviceProfile, Point, Positive

MEMORY_SHARE = 0.8  # of a device's memory that experts may take: the rest is for the system, Python and scratch
# Bytes of one weight: int8 has a float16 scale for each output channel, int4 one for each group of 128.
_WEIGHT_BYTES = {"fp16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
PRECISIONS = tuple(_WEIGHT_BYTES)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    low: Positive  # the pessimistic end
    planning: Positive
    high: Positive
    source: str


class _Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    power_mode: str
    memory_gb: tuple[Positive, str]  # value and source, in all three
    bandwidth_gb_per_s: tuple[Positive, str]
    fp16_tflops: tuple[Positive, str]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    memory_efficiency: _Range
    compute_efficiency: _Range
    call_overhead_ms: _Range
    devices: dict[str, _Module]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A SwiGLU expert: three matrices of d_model x d_ff."""

    d_model: Count
    d_ff: Count

    @property
    def weights(self) -> int:
        """How many."""
        return 3 * self.d_model * self.d_ff

    @property
    def flops(self) -> int:
        """Of one token."""
        return 2 * self.weights

    def weight_bytes(self, precision: str) -> int:
        """Return what the weights take, scales included.

        Raises:
            ValueError: no such precision.
        """
        if precision not in _WEIGHT_BYTES:
            raise ValueError(f"precision {precision!r} is not modelled; expected one of {', '.join(PRECISIONS)}")
        scales = 2 * (2 * self.d_ff + self.d_model) if precision == "int8" else 0
        return math.ceil(self.weights * _WEIGHT_BYTES[precision]) + scales


def hardware_names() -> tuple[str, ...]:
    """Return the names that `modelled_profile` takes."""
    return tuple(_table().devices)


def memory_bytes(hardware: str) -> int:
    """Return the memory of a module; some of it is taken by the system before anything starts."""
    return int(_module(hardware).memory_gb[0] * 1e9)


def experts_that_fit(hardware: str, precision: str, shape: ExpertShape) -> int:
    """Return how many experts a module can hold, with headroom."""
    return int(MEMORY_SHARE * memory_bytes(hardware) // shape.weight_bytes(precision))


def modelled_profile(hardware: str, precision: str, shape: ExpertShape) -> DeviceProfile:
    """Compute the profile of a module from its published figures.

    Args:
        hardware: one of `hardware_names()`.
        precision: of the weights; int8 and int4 are weight-only, so they save bytes, not arithmetic.
        shape: of one expert.

    Raises:
        ValueError: no such module or precision.
    """
    module, table = _module(hardware), _table()
    weight_bytes = shape.weight_bytes(precision)

    def call_ms(tokens: int, end: str) -> float:
        memory, compute, overhead = (
            getattr(spread, end)
            for spread in (table.memory_efficiency, table.compute_efficiency, table.call_overhead_ms)
        )
        reading_ms = weight_bytes / (module.bandwidth_gb_per_s[0] * 1e6 * memory)
        computing_ms = tokens * shape.flops / (module.fp16_tflops[0] * 1e9 * compute)
        return float(overhead + max(reading_ms, computing_ms))

    bytes_per_flop = module.bandwidth_gb_per_s[0] * 1e9 / (module.fp16_tflops[0] * 1e12)
    bend = weight_bytes / shape.flops / bytes_per_flop
    bend *= table.compute_efficiency.planning / table.memory_efficiency.planning
    bends = (max(1, math.floor(bend)), math.floor(bend) + 1)  # with both, what is read between points is exact
    sources = {
        f"memory {module.memory_gb[0]:g} GB": module.memory_gb[1],
        f"bandwidth {module.bandwidth_gb_per_s[0]:g} GB/s": module.bandwidth_gb_per_s[1],
        f"dense FP16 {module.fp16_tflops[0]:g} TFLOP/s": module.fp16_tflops[1],
        **{
            f"{name} {spread.planning:g} ({spread.low:g} to {spread.high:g})": spread.source
            for name, spread in (
                ("memory efficiency", table.memory_efficiency),
                ("compute efficiency", table.compute_efficiency),
                ("overhead of a call, ms", table.call_overhead_ms),
            )
        },
    }
    return DeviceProfile(
        VERSION,
        device=f"{module.name}, {module.power_mode}",
        software="roofline of published figures",
        engine="none",
        precision=precision,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        points=tuple(
            Point(tokens, call_ms(tokens, "planning"), call_ms(tokens, "low")) for tokens in sorted({*_TOKENS, *bends})
        ),
        origin="modelled",
        sources=tuple(f"{value}: {table.sources[key]}" for value, key in sources.items()),
    )


def _module(hardware: str) -> _Module:
    devices = _table().devices
    if hardware not in devices:
        raise ValueError(f"no modelled device is called {hardware!r}; expected one of {', '.join(devices)}")
    return devices[hardware]


@cache
def _table() -> _Table:
    return msgspec.json.decode((files("wdmoe.profiles") / "hardware.json").read_bytes(), type=_Table)
