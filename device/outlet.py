"""The device's side of a band that is divided: replies leave no faster than their requests allow."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from wdmoe.runtime.departures import Departures, Pace
from wdmoe.runtime.messages import MOST_US, ExpertReply, ExpertRequest, Message


@dataclass(slots=True)
class Outlet:
    """Holds replies until a share of the real link would have carried them; everything else goes at once."""

    _pace: Pace = field(default_factory=Pace)
    _held: Departures[Message] = field(default_factory=Departures)
    _asked: dict[int, tuple[float, float]] = field(default_factory=dict)  # of requests not answered: share, bit/us up

    def note(self, request: ExpertRequest) -> None:
        """Remember at what rate the reply to a request may leave."""
        if request.share is not None and request.up_mbps is not None:
            self._asked[request.request_id] = (request.share, request.up_mbps)

    def release(self, answer: Message, now_s: float) -> list[Message]:
        """Return an answer that leaves now; hold a reply that may not, and let it say that it waited."""
        header = answer.header
        asked = self._asked.pop(getattr(header, "request_id", None) or 0, None)
        if asked is None or not isinstance(header, ExpertReply) or answer.rows is None:
            return [answer]
        share, mbps = asked
        leave_s = self._pace.leave_s(now_s, 8e-6 * answer.rows.nbytes / mbps, share)
        queue_us = min(MOST_US, header.queue_us + round(1e6 * (leave_s - now_s)))
        self._held.hold(Message(msgspec.structs.replace(header, queue_us=queue_us), answer.rows), leave_s)
        return []

    @property
    def holding(self) -> bool:
        """Whether anything waits for its moment."""
        return self._held.next_s < float("inf")

    def due(self, now_s: float) -> list[Message]:
        """Take the replies that leave now."""
        return list(self._held.due(now_s))

    def wait_s(self, now_s: float, at_most_s: float) -> float:
        """Return how long to sleep; see `Departures`."""
        return self._held.wait_s(now_s, at_most_s)
