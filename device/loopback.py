"""How long this machine's own loopback takes: an emulated link stands in its place, and so need not add it."""

from __future__ import annotations

import threading
import time

import numpy as np

from wdmoe.runtime.links import BS, Parcel, ZmqLink, dial, listen
from wdmoe.runtime.messages import ExpertReply, ExpertRequest, Message, decode, encode

_ECHOES = 40
_PAUSE_S = 4e-3  # between them, as between requests: whoever wakes from sleep is slower
_LIMIT_S = 2.0
_WIDTH = 32  # of the row that goes back and forth


def loopback_round_trip_ms() -> float:
    """Measure a request and its reply between two threads, over sockets like those of the link; 0 if nothing comes.

    A low percentile: a machine that is busy now need not be so later, and a reply that is a little late is better than
    one that is early.
    """
    station = listen("tcp://127.0.0.1:0", 1 << 16)
    device = dial(station.address, 1 << 16)
    stop = threading.Event()
    thread = threading.Thread(target=_echo, args=(device, stop), name="echo")
    thread.start()
    times_ms: list[float] = []
    deadline_s = time.perf_counter() + _LIMIT_S
    try:
        # The device speaks first: that is how the station learns of it.
        while not (arrived := station.exchange([], 0.05)) and time.perf_counter() < deadline_s:
            pass
        for number in range(1, _ECHOES + 1) if arrived else ():
            time.sleep(_PAUSE_S)
            before_s = time.perf_counter()
            waiting = [Parcel(arrived[0].peer, encode(_request(number)))]
            while time.perf_counter() < deadline_s:
                replies = [decode(parcel.frames, _WIDTH).header for parcel in station.exchange(waiting, 0.05)]
                waiting = []
                if any(isinstance(reply, ExpertReply) and reply.request_id == number for reply in replies):
                    times_ms.append((time.perf_counter() - before_s) * 1e3)
                    break
    finally:
        stop.set()
        thread.join()
        station.close()
    return float(np.percentile(times_ms, 10)) if times_ms else 0.0


def _echo(device: ZmqLink, stop: threading.Event) -> None:
    hello = Parcel(BS, encode(_reply(0)))
    outgoing, heard = [hello], False
    while not stop.is_set():
        arrived = device.exchange(outgoing, 0.02)
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
    return Message(ExpertRequest(number, 0, 1, "fp16", (0,), (1,), index, weights), np.ones((1, _WIDTH), "<f2"))


def _reply(number: int) -> Message:
    return Message(ExpertReply(number, 1, "fp16", 1, 1), np.ones((1, _WIDTH), "<f2"))
