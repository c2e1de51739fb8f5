"""How long a request will take: the device's own profile and the round trip, corrected by what is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

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


@dataclass(slots=True)
class LatencyTracker:
    """Corrects one device's prediction while the system runs."""

    profile: DeviceProfile
    round_trip_ms: float = 0.0
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    compute_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # the same, computing alone
    rows_air_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # a row there and back, measured
    _model: DeviceLatency | None = None

    def observe_round_trip(self, measured_ms: float) -> None:
        """Take the round trip of a ping; the smallest seen is the link, the rest was waiting."""
        self.round_trip_ms = min(self.round_trip_ms, measured_ms) if self.round_trip_ms else measured_ms
        self._model = None

    def observe_request(
        self, counts: Sequence[int], measured_ms: float, rows: int | None = None, compute_ms: float | None = None
    ) -> None:
        """Take what a request really took, and what of it the device says it computed; see `DeviceLatency.request_ms`."""
        uncorrected = replace(self.model(), correction=1.0).request_ms(counts, rows)
        if uncorrected > 0:
            low, high = _CORRECTION_RANGE
            self.ratios.append(min(high, max(low, measured_ms / uncorrected)))
            if compute_ms is not None:
                self._observe_parts(counts, measured_ms, rows or sum(counts), compute_ms)
            self._model = None

    def _observe_parts(self, counts: Sequence[int], measured_ms: float, rows: int, compute_ms: float) -> None:
        low, high = _CORRECTION_RANGE
        predicted_ms = replace(self.model(), correction=1.0, round_trip_ms=0.0, row_link_ms=0.0).request_ms(counts)
        self.compute_ratios.append(min(high, max(low, compute_ms / predicted_ms)))
        if rows >= _ROWS_THAT_TELL:
            self.rows_air_ms.append(max(0.0, measured_ms - compute_ms - self.round_trip_ms) / rows)

    def parts_ms(self, counts: Sequence[int], rows: int) -> tuple[float, float]:
        """Predict how long a request is on the air, there and back, and how long the device computes it.

        Where the link's rate is not known, the quarter of requests that were least disturbed tells it: of the others, some
        waited for the air behind each other.
        """
        row_air_ms = self.profile.row_link_ms
        if not row_air_ms and self.rows_air_ms:
            row_air_ms = sorted(self.rows_air_ms)[len(self.rows_air_ms) // 4]
        compute_ms = sum(interpolate(self.model().curve, count) for count in counts)
        return rows * row_air_ms, compute_ms * (median(self.compute_ratios) if self.compute_ratios else 1.0)

    def model(self) -> DeviceLatency:
        """Return the model as it stands now."""
        if self._model is None:
            correction = median(self.ratios) if self.ratios else 1.0
            self._model = DeviceLatency(self.profile.curve(), self.round_trip_ms, correction, self.profile.row_link_ms)
        return self._model
