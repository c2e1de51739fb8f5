"""A flag for signal handlers.

`threading.Event` is none: its `set` takes a lock, and a second signal, on the same thread, finds it held and waits for ever.
"""

from __future__ import annotations


class StopFlag:
    """Set once, by a signal handler or another thread; takes no lock."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Ask for a stop."""
        self._set = True

    def is_set(self) -> bool:
        """Say whether a stop was asked for."""
        return self._set
