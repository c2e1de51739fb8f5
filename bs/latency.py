"""How long a request will take: the device's own profile and the round trip, corrected by what is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
import numpy.typing as npt

from wdmoe.profiles.device_profile import DeviceProfile, interpolate

_WINDOW = 33  # measurements the correction is the median of: robust, and quick to follow a change
_CORRECTION_RANGE = (0.05, 50.0)


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
    _model: DeviceLatency | None = None

    def observe_round_trip(self, measured_ms: float) -> None:
        """Take the round trip of a ping; the smallest seen is the link, the rest was waiting."""
        self.round_trip_ms = min(self.round_trip_ms, measured_ms) if self.round_trip_ms else measured_ms
        self._model = None

    def observe_request(self, counts: Sequence[int], measured_ms: float, rows: int | None = None) -> None:
        """Take what a request really took; see `DeviceLatency.request_ms`."""
        uncorrected = replace(self.model(), correction=1.0).request_ms(counts, rows)
        if uncorrected > 0:
            low, high = _CORRECTION_RANGE
            self.ratios.append(min(high, max(low, measured_ms / uncorrected)))
            self._model = None

    def model(self) -> DeviceLatency:
        """Return the model as it stands now."""
        if self._model is None:
            correction = median(self.ratios) if self.ratios else 1.0
            self._model = DeviceLatency(self.profile.curve(), self.round_trip_ms, correction, self.profile.row_link_ms)
        return self._model
