"""Media that carry one message at a time: of one emulated device, or of all that share a radio channel."""

from __future__ import annotations

import fcntl
import os
from bisect import insort
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from wdmoe.runtime.errors import WdmoeError

Piece = tuple[float, float]  # start and end, seconds of a clock that all who share a channel read

_KEPT_S = 1.0  # what ended so long ago is forgotten: whoever shares the file reads the clock a little later
_AHEAD_S = 600.0  # what lies so far ahead was left by an earlier start of this machine
_PAIR_BYTES = 16


class Channel(Protocol):
    """Takes reservations in the order in which they are made; a later one may go in a gap between earlier ones."""

    def reserve(self, now_s: float, ready_s: float, duration_s: float) -> float:
        """Take the first free piece that begins at `ready_s` or later, and return where it begins.

        Nothing will be reserved before `now_s` any more.
        """
        ...


class OwnChannel:
    """A channel of one process."""

    def __init__(self) -> None:
        self._taken: list[Piece] = []

    def reserve(self, now_s: float, ready_s: float, duration_s: float) -> float:
        """Take the first free piece; see `Channel`."""
        self._taken = [piece for piece in self._taken if piece[1] > now_s]
        return _take(self._taken, ready_s, duration_s)


class SharedChannel:
    """A channel that processes of one machine share through a file of (start, end) pairs, locked while it is used."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            WdmoeError: it cannot be opened, or is something else.
        """
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise WdmoeError(f"cannot open the channel {path}: {error.strerror}") from error
        if os.fstat(self._file).st_size % _PAIR_BYTES:
            raise WdmoeError(f"{path} is not a channel of emulated devices; give another --channel")

    def reserve(self, now_s: float, ready_s: float, duration_s: float) -> float:
        """Take the first free piece; see `Channel`."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            pairs = np.frombuffer(os.pread(self._file, os.fstat(self._file).st_size, 0), "<f8").reshape(-1, 2).tolist()
            taken = [(start, end) for start, end in pairs if end > now_s - _KEPT_S and start < now_s + _AHEAD_S]
            start_s = _take(taken, ready_s, duration_s)
            data = np.array(taken, "<f8").tobytes()
            os.pwrite(self._file, data, 0)
            os.ftruncate(self._file, len(data))
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return start_s


def _take(taken: list[Piece], ready_s: float, duration_s: float) -> float:
    """Insert the first free piece into ascending, disjoint ones."""
    start_s = _first_gap(taken, ready_s, duration_s)
    if duration_s > 0:
        insort(taken, (start_s, start_s + duration_s))
    return start_s


def _first_gap(taken: Sequence[Piece], ready_s: float, duration_s: float) -> float:
    start_s = ready_s
    for begin_s, end_s in taken:
        if start_s + duration_s <= begin_s:
            break
        start_s = max(start_s, end_s)
    return start_s
