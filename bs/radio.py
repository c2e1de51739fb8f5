"""A radio cell: distances, path loss, fading and movement of devices, as spectral efficiencies. Seeded, no clock of its own.

    path loss = 32.4 + 20 log10(f / GHz) + 20 log10(d / m) dB          SNR = P 10^(-loss / 10) fading / (N0 B)
    efficiency = log2(1 + SNR), at most `most`

Power is spread evenly over the band B, so that a share of it has the same efficiency as the whole. Fading is Rayleigh: its
power is exponential with mean 1, drawn anew for each block of each question, the same both ways, known to who decides.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Floats64 = npt.NDArray[np.float64]
_WORST_FADE = 0.02  # of the mean power: beyond it a real system would wait for better times
_NEAREST_M = 1.0


@dataclass(frozen=True, slots=True)
class RadioConfig:
    """What a cell is like; the defaults are those of docs/simulator.md."""

    near_m: float = 50.0  # devices are spread evenly over a ring from here
    far_m: float = 400.0
    ghz: float = 3.5
    mhz: float = 100.0  # in all
    bs_w: float = 10.0
    device_w: float = 0.2
    noise_dbm_per_hz: float = -174.0
    most: float = 8.0  # bit/s/Hz, what modulation and coding can use
    rtt_ms: float = 2.0
    fading: bool = True
    speed: float = 0.0  # m/s, straight on, and back where the ring ends

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("near_m", "ghz", "mhz", "bs_w", "device_w", "most", "rtt_ms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"radio: {name} is {getattr(self, name)}, expected more than 0")
        if not self.far_m >= self.near_m >= _NEAREST_M:
            raise ValueError(f"radio: {self.near_m} to {self.far_m} m, expected {_NEAREST_M:g} <= near_m <= far_m")
        if not self.speed >= 0:
            raise ValueError(f"radio: speed is {self.speed}, expected at least 0")


def parse_radio(text: str) -> RadioConfig:
    """Read `key=value,key=value`, as in `far_m=200,fading=false,speed=1.5`; what is left out keeps its default.

    Raises:
        ValueError: a key or a value is unknown.
    """
    kinds = {field.name: type(field.default) for field in fields(RadioConfig)}
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in kinds:
            raise ValueError(f"radio has no option {key!r}; it has: {', '.join(kinds)}")
        if kinds[key] is bool:
            if value not in ("true", "false"):
                raise ValueError(f"radio: {key} is {value!r}, expected true or false")
            values[key] = value == "true"
            continue
        try:
            values[key] = float(value)
        except ValueError as error:
            raise ValueError(f"radio: {key} is {value!r}, expected a number") from error
    return RadioConfig(**values)


class Cell:
    """Where the devices of a cell are, and how well they are heard now."""

    def __init__(self, config: RadioConfig, n_devices: int, seed: int) -> None:
        """Spread devices evenly over the ring's area."""
        self.config = config
        self._rng = np.random.default_rng(seed)
        squares = self._rng.uniform(config.near_m**2, config.far_m**2, n_devices)
        angle, heading = self._rng.uniform(0, 2 * np.pi, (2, n_devices))
        self._at_m = np.sqrt(squares) * np.exp(1j * angle)  # the base station is at 0
        self._heading = np.exp(1j * heading)

    @property
    def distance_m(self) -> Floats64:
        """[K], of each device from the base station."""
        distance: Floats64 = np.abs(self._at_m)
        return distance

    def efficiencies(self) -> tuple[Floats64, Floats64]:
        """Draw this block's fading; return bit/s/Hz down and up, each [K]."""
        config = self.config
        loss_db = 32.4 + 20 * np.log10(config.ghz) + 20 * np.log10(self.distance_m)
        gain = 10 ** (-loss_db / 10)
        if config.fading:
            gain = gain * np.maximum(_WORST_FADE, self._rng.exponential(1.0, len(gain)))
        noise_w = 10 ** (config.noise_dbm_per_hz / 10) / 1e3 * config.mhz * 1e6
        down, up = (np.log2(1 + power_w * gain / noise_w) for power_w in (config.bs_w, config.device_w))
        return np.minimum(down, config.most), np.minimum(up, config.most)

    def pass_time(self, seconds: float) -> None:
        """Let devices move."""
        if not self.config.speed:
            return
        self._at_m = self._at_m + self._heading * self.config.speed * seconds
        distance_m = self.distance_m
        outside = (distance_m > self.config.far_m) | (distance_m < self.config.near_m)
        # Turned to the middle of the ring, whichever edge it is at.
        inward = -self._at_m[outside] / np.maximum(distance_m[outside], 1e-9)
        self._heading[outside] = np.where(distance_m[outside] > self.config.far_m, inward, -inward)
        self._at_m[outside] *= np.clip(distance_m[outside], self.config.near_m, self.config.far_m) / np.maximum(
            distance_m[outside], 1e-9
        )
