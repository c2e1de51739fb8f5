"""Requests in pieces, by rows: a device computes one while the next is on its way and the sums of the last one come back.

It pays where computing takes about as long as the way there and back, and costs a message and another reading of the
experts' weights for each piece. So it is decided for each block, by the latency model. With several microbatches in
flight the others fill the gaps, and nothing is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wdmoe.bs.airtime import Asked, Medium

MOST_PIECES = 4
LEAST_ROWS = 8  # of a piece
LEAST_GAIN = 0.1  # of the time that the request takes whole
LEAST_GAIN_MS = 0.5  # what sending and taking another message may cost

Split = tuple[Asked, int]  # one of so many alike


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose request is sent next, and in how many pieces."""

    which: int  # of the block's requests
    pieces: int = 1


def worth_asking(rows: Sequence[int]) -> bool:
    """Say whether any request has enough rows for two pieces."""
    return max(rows, default=0) >= 2 * LEAST_ROWS


def split_options(counts: Sequence[int], rows: int, ask: Callable[[Sequence[int], int], Asked]) -> list[Asked]:
    """Predict one piece of a request, of 1, 2, ... pieces alike.

    Args:
        counts: rows of each expert called.
        rows: that travel.
        ask: predicts a request of such counts and rows.
    """
    most = max(1, min(MOST_PIECES, rows // LEAST_ROWS))
    return [ask([-(-count // n) for count in counts], -(-rows // n)) for n in range(1, most + 1)]


def pieces_of_block(options: Sequence[Sequence[Asked]], medium: Medium, duplex: Sequence[bool]) -> list[int]:
    """Choose into how many pieces each device's request is cut.

    Args:
        options: of each device, in the order of sending, `split_options` at its share of the band.
        medium: what the links are.
        duplex: of each device, whether its link carries both ways at a time; on a shared channel nobody's does.
    """
    whole_ms = [finish_ms([(asked[0], 1)]) for asked in options]
    pieces, best_ms = [], []
    for asked, ms, both in zip(options, whole_ms, duplex, strict=True):
        split_ms, n = min((finish_ms([(piece, n)], both), n) for n, piece in enumerate(asked, 1))
        pays = _pays(split_ms, ms)
        pieces.append(n if pays else 1)
        best_ms.append(split_ms if pays else ms)
    if medium == "shared":  # what others send meanwhile may fill the gaps as well
        together_ms = finish_ms([(asked[n - 1], n) for asked, n in zip(options, pieces, strict=True)])
        return pieces if _pays(together_ms, finish_ms([(asked[0], 1) for asked in options])) else [1] * len(pieces)
    last_ms = max(best_ms, default=0.0)  # whoever is whole by then need not be split
    return [1 if ms <= last_ms else n for ms, n in zip(whole_ms, pieces, strict=True)]


def finish_ms(requests: Sequence[Split], duplex: bool = False) -> float:
    """Say when all are done on one channel: pieces go down, replies come back as they are ready, a device computes in turn.

    As `airtime.few_finish_ms` has it for whole requests. Half-duplex, all pieces go down before the first reply; duplex, it
    need not wait for them.
    """
    sent = 0.0
    ready: list[tuple[float, float, float]] = []
    for (send, way, compute, reply), n in requests:
        done = 0.0
        for _ in range(n):
            sent += send
            done = max(done, sent + way) + compute
            ready.append((done, reply, way))
    end, last = 0.0 if duplex else sent, 0.0
    for at, reply, way in sorted(ready):
        end = max(end, at) + reply
        last = max(last, end + way)
    return last


def _pays(split_ms: float, whole_ms: float) -> bool:
    return whole_ms - split_ms > max(LEAST_GAIN_MS, LEAST_GAIN * whole_ms)
