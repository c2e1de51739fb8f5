"""The seam to the network: one method that sends what is to go and returns what has come.

`ZmqLink` is the real one (ROUTER at the base station, DEALER on a device; devices dial the base station, which
works through NAT and WiFi isolation); `MemoryLink` is its twin for tests: peers are functions, waiting
moves a virtual clock. A link carries frames and knows nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import zmq

from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.keys import KeyPair
from wdmoe.runtime.messages import MAX_HEADER_BYTES, Frame

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

Peer = bytes  # how the link tells its peers apart; opaque above it
BS: Peer = b"bs"  # what a device calls its only peer
# As plain numbers: an enum's own & and | take as long as what they are for.
_POLLIN, _NOBLOCK, _SNDMORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)
# Smaller frames are copied, 20 us for 256 KiB: pyzmq hands what it does not copy to a thread, which costs more.
_COPIED_BYTES = 1 << 19
_DRAIN_LIMIT = 256  # parcels taken at once, so that a flooding peer cannot hold the loop


@dataclass(frozen=True, slots=True)
class Parcel:
    """Frames with the peer they go to or come from."""

    peer: Peer
    frames: Sequence[Frame]
    key: str | None = None  # of what arrived: the sender's public key, proven by CURVE; None: not encrypted


class Link(Protocol):
    """A way to exchange parcels with peers. `exchange` belongs to one thread; `wake` may be called from any."""

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        """Send, then return what has come; wait for it until something comes, `wake` is called or time is up.

        Parcels to a peer that is gone are dropped: deadlines notice.
        """
        ...

    def wake(self) -> None:
        """Let a waiting `exchange` return early."""
        ...

    def redial(self) -> None:
        """Give up the connection and make a new one, where this side dials."""
        ...

    def close(self) -> None:
        """Flush for a moment, then free the sockets."""
        ...


class ZmqLink:
    """A link over ZeroMQ; made by `listen` and `dial`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        sock: zmq.Socket[bytes],
        routed: bool,
        authenticator: ThreadAuthenticator | None = None,
        dialled: str | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._dialled = dialled
        self._context = context
        self._socket = sock
        self._routed = routed
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        # The socket's descriptor says that something happened to it; `zmq.Poller` would ask twice before it waits.
        self._poller = select.poll()
        self._poller.register(self._socket.fileno(), select.POLLIN)
        self._poller.register(self._wake_in, select.POLLIN)

    @property
    def address(self) -> str:
        """The address bound to, with the port the system chose where 0 was asked for."""
        return self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        """Send, then return what has come; see `Link`."""
        for parcel in outgoing:
            self._send(parcel)
        arrived = self._drain()
        if arrived or timeout_s <= 0:
            return arrived
        deadline_s = time.monotonic() + timeout_s
        while not arrived and timeout_s > 0:
            ready = self._poller.poll(timeout_s * 1000)
            arrived = self._drain()
            if any(descriptor == self._wake_in.fileno() for descriptor, _ in ready):
                self._clear_wake()
                break
            timeout_s = deadline_s - time.monotonic()  # what happened may have been no message
        return arrived

    def wake(self) -> None:
        """Let a waiting `exchange` return early; on a closed link, nothing happens."""
        # An OSError here is a buffer full of wakes already, or a signal that came when the link had just been closed.
        with contextlib.suppress(OSError):
            self._wake_out.send(b"\0")

    def redial(self) -> None:
        """Give up the connection and make a new one, where this side dials.

        After a breach of ZeroMQ's own protocol (an encrypted peer where a plain one was expected, an oversized
        frame) libzmq does not reconnect by itself.
        """
        if self._dialled is not None:
            self._socket.disconnect(self._dialled)
            self._socket.connect(self._dialled)

    def close(self) -> None:
        """Flush for a moment, then free the sockets."""
        self._socket.close(linger=200)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        self._wake_out.close()
        self._wake_in.close()

    def _send(self, parcel: Parcel) -> None:
        *first, last = parcel.frames
        try:
            if self._routed:
                self._socket.send(parcel.peer, _SNDMORE | _NOBLOCK)
            for frame in first:
                self._socket.send(frame, _SNDMORE | _NOBLOCK, len(frame) < _COPIED_BYTES)
            self._socket.send(last, _NOBLOCK, len(last) < _COPIED_BYTES)
        except zmq.Again:
            return  # no connection or a full queue; the sender's deadline will tell
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def _drain(self) -> list[Parcel]:
        arrived: list[Parcel] = []
        while len(arrived) < _DRAIN_LIMIT and int(self._socket.get(zmq.EVENTS)) & _POLLIN:
            first = frame = self._socket.recv(_NOBLOCK, copy=False)
            frames: list[Frame] = [] if self._routed else [first.buffer]
            while frame.more:
                frame = self._socket.recv(_NOBLOCK, copy=False)
                frames.append(frame.buffer)
            peer = first.bytes if self._routed else BS
            arrived.append(Parcel(peer, frames, None if self._authenticator is None else _user_id(first)))
        return arrived

    def _clear_wake(self) -> None:
        try:
            while self._wake_in.recv(4096):
                pass
        except BlockingIOError:
            return


def is_loopback(address: str) -> bool:
    """Say whether an address can only be reached from this machine."""
    if address.startswith("ipc://"):
        return True
    try:
        host = urlsplit(address).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _user_id(frame: zmq.Frame) -> str | None:
    try:
        return frame.get("User-Id") or None  # type: ignore[return-value]
    except zmq.ZMQError:
        return None


def listen(address: str, max_frame_bytes: int, keys: KeyPair | None = None) -> ZmqLink:
    """Open the base station's side.

    Args:
        address: for example "tcp://127.0.0.1:5555"; port 0 lets the system choose.
        max_frame_bytes: a peer that sends a larger frame is cut off before memory is taken.
        keys: of the base station: everything is encrypted, and each parcel carries its sender's public key, which
            the caller must judge. None: nothing is encrypted.

    Raises:
        WdmoeError: the address cannot be bound.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.ROUTER)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    sock.setsockopt(zmq.MAXMSGSIZE, max(max_frame_bytes, MAX_HEADER_BYTES))
    sock.setsockopt(zmq.SNDHWM, 10_000)
    authenticator: ThreadAuthenticator | None = None
    if keys is not None:
        # Only here: it brings asyncio along, which a device never needs.
        from zmq.auth import CURVE_ALLOW_ANY
        from zmq.auth.thread import ThreadAuthenticator

        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        # Whoever proves a key may speak; what an unknown key may say is decided above the link.
        authenticator.configure_curve(domain="*", location=CURVE_ALLOW_ANY)
        sock.curve_secretkey, sock.curve_publickey = keys.secret.encode(), keys.public.encode()
        sock.curve_server = True
    try:
        sock.bind(address)
    except zmq.ZMQError as error:
        sock.close(linger=0)
        if authenticator is not None:
            authenticator.stop()
        context.term()
        raise WdmoeError(
            f"cannot listen on {address}: {error.strerror}; give another --listen, "
            "or stop the wdmoe-bs that is running there"
        ) from error
    return ZmqLink(context, sock, routed=True, authenticator=authenticator)


def dial(address: str, max_frame_bytes: int, keys: KeyPair | None = None, bs_public: str | None = None) -> ZmqLink:
    """Open a device's side; ZeroMQ reconnects by itself, with a growing pause of up to 2 s.

    Args:
        address: of the base station.
        max_frame_bytes: as for `listen`.
        keys: of the device; with them everything is encrypted.
        bs_public: public key of the base station: nobody else can pass for it.

    Raises:
        WdmoeError: the address is not one.
    """
    if (keys is None) != (bs_public is None):
        raise ValueError("an encrypted link needs both the device's keys and the base station's public key")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.MAXMSGSIZE, max(max_frame_bytes, MAX_HEADER_BYTES))
    sock.setsockopt(zmq.RECONNECT_IVL, 100)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    # Nothing queues for a connection that is not there: a hello from an hour ago helps nobody.
    sock.setsockopt(zmq.IMMEDIATE, 1)
    if keys is not None and bs_public is not None:
        sock.curve_secretkey, sock.curve_publickey = keys.secret.encode(), keys.public.encode()
        sock.curve_serverkey = bs_public.encode()
    try:
        sock.connect(address)
    except zmq.ZMQError as error:
        sock.close(linger=0)
        context.term()
        raise WdmoeError(f"cannot dial {address}: {error.strerror}; expected tcp://HOST:PORT") from error
    return ZmqLink(context, sock, routed=False, dialled=address)


Handler = Callable[[Sequence[Frame]], Iterable[Sequence[Frame]]]


class MemoryLink:
    """The base station's side of a network inside one process.

    Each peer is a function from the frames it gets to the messages it answers with. Messages that peers send on
    their own (a hello) are put in with `deliver`. With nothing to hand over, waiting moves the clock.
    """

    def __init__(self, peers: Mapping[Peer, Handler], clock: VirtualClock) -> None:
        self.peers = dict(peers)
        self._clock = clock
        self._arrived: deque[Parcel] = deque()
        self._woken = threading.Event()

    def deliver(self, peer: Peer, frames: Sequence[Frame]) -> None:
        """Let a peer send a message of its own accord."""
        self._arrived.append(Parcel(peer, frames))

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        """Send, then return what has come; see `Link`."""
        for parcel in outgoing:
            if (handler := self.peers.get(parcel.peer)) is not None:
                # Copied, as a socket would: nobody may count on sharing memory with a peer.
                sent = [bytes(frame) for frame in parcel.frames]
                self._arrived.extend(Parcel(parcel.peer, [bytes(f) for f in frames]) for frames in handler(sent))
        if not self._arrived and not self._woken.is_set():
            self._clock.advance(max(0.0, timeout_s))
        self._woken.clear()
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def wake(self) -> None:
        """Let the next `exchange` return without waiting."""
        self._woken.set()

    def redial(self) -> None:
        """Nothing to dial."""

    def close(self) -> None:
        """Nothing to free."""
