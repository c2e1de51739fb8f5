"""How long a request will take: the device's own profile and the round trip, corrected by what is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from wdmoe.profiles.device_profile import DeviceProfile, interpolate

_WINDOW = 33  # measurements the correction is the median of: robust, and quick to follow a change
_CORRECTION_RANGE = (0.05, 50.0)
_ROWS_THAT_TELL = 16  # of a request, from which its time on the air says something of the link's rate


@dataclass(frozen=True, slots=True)
class DeviceLatency:
    """The latency model of one device, as plain values."""

    curve: tuple[tuple[int, float], ...]  # (tokens, ms per expert call), monotone
    round_trip_ms: float
    correction: float = 1.0  # measured over predicted, median of the last requests
    row_link_ms: float = 0.0  # what each row adds on a link whose rate is known, there and back

    def request_ms(self, counts: Sequence[int], rows: int | None = None) -> float:
        """Predict a request that calls one expert after another.

        Args:
            counts: rows of each expert called.
            rows: that travel; None: no row is used by two experts.
        """
        compute_ms = sum(interpolate(self.curve, count) for count in counts)
        link_ms = self.row_link_ms * (sum(counts) if rows is None else rows)
        return (self.round_trip_ms + link_ms + compute_ms) * self.correction


def row_ms(
    devices: Sequence[DeviceLatency], expert_counts: npt.NDArray[np.int64], owner: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Predict the time of one row on each device, at the load that the model's own top-k puts on it.

    Args:
        devices: latency model of each device.
        expert_counts: [n_experts], tokens that want each expert.
        owner: [n_experts], device of each expert.

    Returns:
        [n_devices] milliseconds; of an idle device, the time of a single row.
    """
    result = np.empty(len(devices))
    for k, device in enumerate(devices):
        counts = [int(n) for n in expert_counts[owner == k] if n > 0] or [1]
        result[k] = device.request_ms(counts) / sum(counts)
    return result


@dataclass(slots=True)
class LatencyTracker:
    """Corrects one device's prediction while the system runs."""

    profile: DeviceProfile
    round_trip_ms: float = 0.0
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    compute_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # the same, computing alone
    rows_air_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # a row there and back, measured
    _model: DeviceLatency | None = None
    _curve: tuple[tuple[int, float], ...] = ()  # of the profile
    _call_ms: dict[int, float] = field(default_factory=dict)  # of the profile, by tokens: each is worked out once

    def __post_init__(self) -> None:
        """Work out the profile's curve, once."""
        self._curve = self.profile.curve()

    def observe_round_trip(self, measured_ms: float) -> None:
        """Take the round trip of a ping; the smallest seen is the link, the rest was waiting."""
        self.round_trip_ms = min(self.round_trip_ms, measured_ms) if self.round_trip_ms else measured_ms
        self._model = None

    def observe_request(
        self, counts: Sequence[int], measured_ms: float, rows: int | None = None, compute_ms: float | None = None
    ) -> None:
        """Take what a request really took, and what of it the device says it computed; see `DeviceLatency.request_ms`."""
        rows = sum(counts) if rows is None else rows
        calls_ms = self._calls_ms(counts)
        uncorrected = self.round_trip_ms + self.profile.row_link_ms * rows + calls_ms
        if uncorrected > 0:
            low, high = _CORRECTION_RANGE
            self.ratios.append(min(high, max(low, measured_ms / uncorrected)))
            if compute_ms is not None:
                self.compute_ratios.append(min(high, max(low, compute_ms / calls_ms)))
                if rows >= _ROWS_THAT_TELL:
                    self.rows_air_ms.append(max(0.0, measured_ms - compute_ms - self.round_trip_ms) / rows)
            self._model = None

    def request_ms(self, counts: Sequence[int], rows: int) -> float:
        """Predict a request; see `DeviceLatency.request_ms`."""
        link_ms = self.round_trip_ms + self.profile.row_link_ms * rows
        return (link_ms + self._calls_ms(counts)) * self.model().correction

    def parts_ms(self, counts: Sequence[int], rows: int) -> tuple[float, float]:
        """Predict how long a request is on the air, there and back, and how long the device computes it.

        Where the link's rate is not known, the quarter of requests that were least disturbed tells it: of the others, some
        waited for the air behind each other.
        """
        row_air_ms = self.profile.row_link_ms
        if not row_air_ms and self.rows_air_ms:
            row_air_ms = sorted(self.rows_air_ms)[len(self.rows_air_ms) // 4]
        return rows * row_air_ms, self._calls_ms(counts) * (median(self.compute_ratios) if self.compute_ratios else 1.0)

    def model(self) -> DeviceLatency:
        """Return the model as it stands now."""
        if self._model is None:
            correction = median(self.ratios) if self.ratios else 1.0
            self._model = DeviceLatency(self._curve, self.round_trip_ms, correction, self.profile.row_link_ms)
        return self._model

    def _calls_ms(self, counts: Sequence[int]) -> float:
        """Predict the expert calls of a request, one after another, without the correction."""
        known = self._call_ms
        for count in counts:
            if count not in known:
                known[count] = interpolate(self._curve, count)
        return sum([known[count] for count in counts])
