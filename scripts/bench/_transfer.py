"""One transfer of bytes over TCP, for links whose rate is to be known: `receive|send ADDRESS BYTES WAIT_S`.

The receiver prints how many bytes came in how many seconds, counted from the first piece, which is not counted. Nothing
but Python's own library: it starts at once, in any namespace.
"""

from __future__ import annotations

import json
import socket
import sys
import time

PORT = 5599
PIECE_BYTES = 1 << 16


def receive(address: str, size: int, wait_s: float) -> None:
    """Take bytes from one sender and say how fast they came."""
    with socket.create_server((address, PORT)) as server:
        server.settimeout(wait_s)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(wait_s)
            got = first = len(connection.recv(PIECE_BYTES))
            started_s = time.perf_counter()
            while got < size and (piece := connection.recv(PIECE_BYTES)):
                got += len(piece)
            took_s = time.perf_counter() - started_s
    print(json.dumps({"bytes": got - first, "seconds": took_s}))


def send(address: str, size: int, wait_s: float) -> None:
    """Send bytes, once somebody listens."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=wait_s)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
    with connection:
        connection.sendall(bytes(size))


if __name__ == "__main__":
    role, where, count, patience = sys.argv[1:]
    {"receive": receive, "send": send}[role](where, int(count), float(patience))
