"""Both members of the seam pass the same tests: a real socket pair on loopback, and the twin in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.keys import make_key
from wdmoe.runtime.links import BS, Link, MemoryLink, Parcel, Peer, dial, listen
from wdmoe.runtime.messages import Frame

Handler = Callable[[Sequence[Frame]], Iterable[Sequence[Frame]]]
OpenLink = Callable[[Handler], AbstractContextManager[tuple[Link, Peer]]]


@contextmanager
def memory(handler: Handler) -> Iterator[tuple[Link, Peer]]:
    link = MemoryLink({b"device": handler}, VirtualClock())
    yield link, b"device"
    link.close()


@contextmanager
def sockets(handler: Handler) -> Iterator[tuple[Link, Peer]]:
    base = listen("tcp://127.0.0.1:0", 1 << 20)
    device = dial(base.address, 1 << 20)
    stop = threading.Event()

    def serve() -> None:
        outgoing = [Parcel(BS, [b"hello"])]
        while not stop.is_set():
            arrived = device.exchange(outgoing, 0.05)
            # Until the connection stands, a hello is dropped: so it is said again.
            outgoing = [Parcel(BS, list(frames)) for parcel in arrived for frames in handler(parcel.frames)]
            if not said_hello.is_set():
                outgoing.append(Parcel(BS, [b"hello"]))

    said_hello = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        peer = receive(base, 1)[0].peer
        said_hello.set()
        for _ in range(5):  # what hellos are still on their way
            base.exchange([], 0.06)
        yield base, peer
    finally:
        stop.set()
        thread.join()
        device.close()
        base.close()


def receive(link: Link, count: int) -> list[Parcel]:
    arrived: list[Parcel] = []
    for _ in range(200):
        arrived += link.exchange([], 0.05)
        if len(arrived) >= count:
            return arrived
    raise AssertionError(f"only {len(arrived)} of {count} parcels came")


members = pytest.mark.parametrize("open_link", [memory, sockets])


@members
def test_what_is_sent_comes_back_from_an_echo(open_link: OpenLink) -> None:
    with open_link(lambda frames: [[bytes(frame) for frame in frames]]) as (link, peer):
        arrived = link.exchange([Parcel(peer, [b"head", b"x" * 200_000])], 5.0) or receive(link, 1)
        assert [bytes(frame) for frame in arrived[0].frames] == [b"head", b"x" * 200_000]
        assert arrived[0].peer == peer


@members
def test_order_is_kept_with_one_peer(open_link: OpenLink) -> None:
    with open_link(lambda frames: [[bytes(frames[0])]]) as (link, peer):
        first = link.exchange([Parcel(peer, [str(i).encode()]) for i in range(50)], 0.5)
        arrived = first + (receive(link, 50 - len(first)) if len(first) < 50 else [])
        assert [bytes(parcel.frames[0]) for parcel in arrived] == [str(i).encode() for i in range(50)]


@members
def test_a_parcel_to_a_peer_that_is_gone_is_dropped(open_link: OpenLink) -> None:
    with open_link(lambda frames: []) as (link, _):
        assert link.exchange([Parcel(b"nobody", [b"x"])], 0.01) == []


@members
def test_wake_ends_a_wait(open_link: OpenLink) -> None:
    with open_link(lambda frames: []) as (link, _):
        link.wake()
        assert link.exchange([], 60.0) == []  # a minute would run into the test's own time limit


def test_a_link_that_is_closed_may_be_woken() -> None:
    link = listen("tcp://127.0.0.1:0", 1 << 20)
    link.close()
    link.wake()  # a second signal may arrive while a device is going


def test_waiting_for_nothing_moves_only_the_virtual_clock() -> None:
    clock = VirtualClock()
    MemoryLink({}, clock).exchange([], 3600.0)
    assert clock.now_s() == 3600.0


def test_an_address_in_use_is_refused_with_what_to_do() -> None:
    first = listen("tcp://127.0.0.1:0", 1 << 20)
    with pytest.raises(WdmoeError, match=r"cannot listen on .* --listen"):
        listen(first.address, 1 << 20)
    first.close()


def test_an_oversized_frame_never_arrives() -> None:
    base = listen("tcp://127.0.0.1:0", 1)  # the limit is never below what a header may need
    device = dial(base.address, 1 << 20)
    for _ in range(40):
        device.exchange([Parcel(BS, [b"x" * (5 << 20)])], 0.01)
        assert base.exchange([], 0.01) == []
    device.close()
    base.close()


def test_an_encrypted_link_proves_the_senders_key_and_hears_nobody_else(tmp_path: Path) -> None:
    station, device = make_key(tmp_path / "bs"), make_key(tmp_path / "device")
    base = listen("tcp://127.0.0.1:0", 1 << 20, station)
    friend = dial(base.address, 1 << 20, device, station.public)
    in_the_clear = dial(base.address, 1 << 20)
    for_another = dial(base.address, 1 << 20, device, device.public)
    for _ in range(100):
        for link in (friend, in_the_clear, for_another):
            link.exchange([Parcel(BS, [b"friend" if link is friend else b"foe"])], 0.01)
        if arrived := base.exchange([], 0.01):
            break
    for _ in range(10):
        in_the_clear.exchange([Parcel(BS, [b"foe"])], 0.01)
        for_another.exchange([Parcel(BS, [b"foe"])], 0.01)
        arrived += base.exchange([], 0.01)
    assert arrived and all((parcel.key, bytes(parcel.frames[0])) == (device.public, b"friend") for parcel in arrived)
    for link in (friend, in_the_clear, for_another, base):
        link.close()


def test_an_encrypted_link_needs_the_base_stations_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base station's public key"):
        dial("tcp://127.0.0.1:1", 1 << 20, make_key(tmp_path / "device"))
