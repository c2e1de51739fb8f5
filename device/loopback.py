"""How long this machine's own loopback takes now: an emulated link stands in its place, and so need not add it."""

from __future__ import annotations

import threading
import time
from collections import deque
from statistics import median

import numpy as np

from wdmoe.runtime.links import BS, Parcel, ZmqLink, dial, listen
from wdmoe.runtime.messages import ExpertReply, ExpertRequest, Message, decode, encode

_WINDOW = 21  # echoes that the median is of: about a second, since a busy machine does not stay as busy
_PAUSE_S = 0.05  # between echoes, as between requests: whoever wakes from sleep is slower
_FIRST_PAUSE_S = 4e-3  # while the window fills
_LIMIT_S = 2.0
_TURN_S = 0.05  # at most, of one wait
_WIDTH = 32  # of the row that goes back and forth


class LoopbackMeter:
    """Sends a request and its reply between two threads again and again, over sockets like those of the link."""

    def __init__(self) -> None:
        """Measure for a moment, then go on in the background until closed."""
        self._times_ms: deque[float] = deque(maxlen=_WINDOW)
        self._best_ms = float("inf")
        self._stop, self._filled = threading.Event(), threading.Event()
        station = listen("tcp://127.0.0.1:0", 1 << 16)
        device = dial(station.address, 1 << 16)
        self._threads = [
            threading.Thread(target=self._echo, args=(device,), name="echo", daemon=True),
            threading.Thread(target=self._measure, args=(station,), name="loopback", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._filled.wait(_LIMIT_S)

    @property
    def round_trip_ms(self) -> float:
        """Median of the last echoes; 0 while there is none."""
        return median(self._times_ms.copy()) if self._times_ms else 0.0

    @property
    def best_ms(self) -> float:
        """Smallest so far; 0 while there is none."""
        return self._best_ms if self._times_ms else 0.0

    def close(self) -> None:
        """Stop measuring."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _measure(self, station: ZmqLink) -> None:
        # The device speaks first: that is how the station learns of it.
        while not (arrived := station.exchange([], _TURN_S)) and not self._stop.is_set():
            pass
        number = 0
        while not self._stop.wait(_PAUSE_S if self._filled.is_set() else _FIRST_PAUSE_S):
            number += 1
            before_s = time.perf_counter()
            outgoing = [Parcel(arrived[0].peer, encode(_request(number)))]
            while not self._stop.is_set() and time.perf_counter() - before_s < _LIMIT_S:
                replies = [decode(parcel.frames, _WIDTH).header for parcel in station.exchange(outgoing, _TURN_S)]
                outgoing = []
                if any(isinstance(reply, ExpertReply) and reply.request_id == number for reply in replies):
                    took_ms = (time.perf_counter() - before_s) * 1e3
                    self._best_ms = min(self._best_ms, took_ms)
                    self._times_ms.append(took_ms)
                    break
            if len(self._times_ms) == _WINDOW:
                self._filled.set()
        station.close()

    def _echo(self, device: ZmqLink) -> None:
        hello = Parcel(BS, encode(_reply(0)))
        outgoing, heard = [hello], False
        while not self._stop.is_set():
            arrived = device.exchange(outgoing, _TURN_S)
            heard = heard or bool(arrived)
            # Until the connection stands, what is sent is lost.
            outgoing = [] if heard else [hello]
            for parcel in arrived:
                request = decode(parcel.frames, _WIDTH).header
                assert isinstance(request, ExpertRequest)
                outgoing.append(Parcel(BS, encode(_reply(request.request_id))))
        device.close()


def _request(number: int) -> Message:
    index, weights = np.zeros(1, "<u4").tobytes(), np.ones(1, "<f4").tobytes()
    header = ExpertRequest(number, 0, 1, "fp16", (0,), (1,), index, weights)
    return Message(header, np.ones((1, _WIDTH), "<f2"))


def _reply(number: int) -> Message:
    return Message(ExpertReply(number, 1, "fp16", 1, 1), np.ones((1, _WIDTH), "<f2"))
