"""Damaged frames over real sockets."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from guarded import Guarded, served
from inprocess import make_service
from processes import command, stop

from fuzzing.frames import Frames, Tally, damaged
from fuzzing.lawful import lawful
from wdmoe.device.service import DeviceService
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.keys import make_key
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Hello,
    Message,
    Welcome,
    decode,
    encode,
)


def fuzz_station_socket(
    rng: np.random.Generator, corpus: Sequence[Frames], guarded: Guarded, count: int, tally: Tally, limit_s: float = 300
) -> None:
    """Let strangers at an encrypted base station that is at work: with a key of their own, without one, without ZMTP."""
    hub, address = guarded.station.hub, guarded.station.config.listen
    before = sum(hub.refused.counts.values())
    ended, heard = threading.Event(), threading.Event()
    own = make_key(guarded.keys / f"stranger-{rng.integers(1 << 30)}.key")
    noise = [damaged(rng, corpus) for _ in range(count)]
    noise = [frames or [b""] for frames in noise]  # a message of no frames cannot be sent
    garbage = [_raw(rng) for _ in range(max(10, count // 100))]
    sent = [0]

    def attack() -> None:
        context: zmq.Context[Any] = zmq.Context()
        keyed, clear = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        keyed.curve_secretkey, keyed.curve_publickey = own.secret.encode(), own.public.encode()
        keyed.curve_serverkey = guarded.bs_public.encode()
        for sock in (keyed, clear):
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.SNDTIMEO, 5000)
            sock.connect(address)
        for number, frames in enumerate(noise):
            keyed.send_multipart(frames)
            sent[0] += 1
            if number % 20 == 0:  # the answers must not pile up
                while keyed.poll(0):
                    keyed.recv_multipart()
            if number % 50 == 0:
                with contextlib.suppress(zmq.Again):
                    clear.send_multipart(frames, flags=zmq.NOBLOCK)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for raw in garbage:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(raw)
        ended.set()
        while not heard.wait(0.01):  # what is still queued must arrive
            while keyed.poll(0):
                keyed.recv_multipart()
        context.destroy(linger=0)

    thread = threading.Thread(target=attack)
    thread.start()
    deadline_s = time.monotonic() + limit_s
    while not ended.is_set() or sum(hub.refused.counts.values()) - before < sent[0]:
        if time.monotonic() > deadline_s or (not thread.is_alive() and not ended.is_set()):
            refused = sum(hub.refused.counts.values()) - before
            tally.hang(f"base station: {sent[0]} frames sent, {refused} refused after {limit_s:g} s")
            break
        try:
            guarded.run()
        except AssertionError as error:
            tally.accept(f"a run answers otherwise: {error}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crash("base station on sockets", error)
        tally.counts["runs"] += 1
    heard.set()
    thread.join(10)
    if sorted(hub.devices) != [f"device-{k}" for k in range(4)]:
        tally.accept(f"devices are now {sorted(hub.devices)}")
    tally.counts["frames"] += sent[0]
    tally.counts["raw_connections"] += len(garbage)
    tally.counts["refused"] += sum(hub.refused.counts.values()) - before


def _raw(rng: np.random.Generator) -> bytes:
    """Bytes for the port itself: nothing, noise, or a greeting of ZMTP and then noise."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    noise = rng.bytes(int(rng.integers(0, 2000)))
    return (b"", noise, greeting + noise, greeting + b"\x04" + noise, b"GET / HTTP/1.1\r\n\r\n")[int(rng.integers(5))]


def fuzz_device_socket(
    rng: np.random.Generator, corpus: Sequence[Frames], folder: Path, count: int, tally: Tally, limit_s: float = 300
) -> None:
    """Let a stranger play base station for a device: it serves on, and answers a sound request as before."""
    service = make_service(folder, RealClock())  # type: ignore[arg-type]
    d_model = service.manifest.model.d_model
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    sound = _sound_request(service)
    words: list[str] = []
    try:
        with served(service, f"tcp://127.0.0.1:{port}", words) as thread:
            peer = _receive(router, limit_s)[0]
            for number in range(count):
                # What is lawful here may end the device or send it away, as a base station may.
                while lawful(frames := damaged(rng, corpus), d_model) not in (None, "ping", "pong", "reply"):
                    pass
                router.send_multipart([peer, *(frames or [b""])])
                tally.counts["frames"] += 1
                if number % 20 == 0:
                    while router.poll(0):
                        peer = router.recv_multipart()[0]
            router.send_multipart([peer, *sound])
            deadline_s = time.monotonic() + limit_s
            asked_s = time.monotonic()
            while True:
                if time.monotonic() > deadline_s or not thread.is_alive():
                    tally.hang(f"device: no answer to a sound request ({'; '.join(words) or 'it runs'})")
                    break
                if not router.poll(200):
                    continue
                peer, *frames = router.recv_multipart()
                header = decode(frames, d_model).header
                if isinstance(header, ErrorReport):
                    tally.counts["refused"] += 1
                if isinstance(header, ExpertReply) and header.request_id == 77:
                    if not np.isfinite(np.frombuffer(frames[1], "<f4")).all():
                        tally.accept("a sound request is answered with other numbers")
                    break
                if time.monotonic() - asked_s > 0.5:
                    router.send_multipart([peer, *sound])
                    asked_s = time.monotonic()
    finally:
        context.destroy(linger=0)


def throw_oversized(folder: Path, sizes_bytes: Sequence[int], tally: Tally, limit_s: float = 60) -> float:
    """Throw frames over the limit at a device process: it takes no memory for them, dials again and answers as before.

    ZeroMQ ends such a connection and never dials again by itself. Memory is the process's peak: it tells what was
    taken even if it was given back.

    Returns:
        the most MiB that the peak grew by with a frame.
    """
    service = make_service(folder, RealClock())  # type: ignore[arg-type]
    sound, d_model = _sound_request(service), service.manifest.model.d_model
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    address = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    line = command("wdmoe-device", "--bundle", folder, "--bs", address, "--engine", "numpy")
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most_mib = 0.0
    try:
        peer, expected = _welcome_and_ask(router, sound, d_model, b"", limit_s)
        for size_bytes in sizes_bytes:
            before_mib = _peak_mib(process.pid)
            router.send_multipart([peer, bytes(size_bytes)])
            tally.counts["frames"] += 1
            tally.counts["oversized"] += 1
            peer, rows = _welcome_and_ask(router, sound, d_model, peer, limit_s)
            if rows != expected:
                tally.accept("a sound request is answered with other numbers after an oversized frame")
            taken_mib = _peak_mib(process.pid) - before_mib
            most_mib = max(most_mib, taken_mib)
            if taken_mib > size_bytes / 2**21:
                tally.accept(f"a frame of {size_bytes / 2**20:.0f} MiB took {taken_mib:.1f} MiB of a device's memory")
    except TimeoutError as error:
        code = process.poll()
        if code is None:
            tally.hang(f"device, after an oversized frame: {error}")
        else:
            tally.crash("device, after an oversized frame", RuntimeError(f"exit code {code}"))
    finally:
        stop([process])
        context.destroy(linger=0)
    return most_mib


def _welcome_and_ask(
    router: Any, sound: Frames, d_model: int, old_peer: bytes, limit_s: float
) -> tuple[bytes, list[bytes]]:
    """Wait for a hello on a connection other than the old one, welcome it, and return it with the answer to a request.

    Raises:
        TimeoutError: no hello or no answer came in time.
    """
    deadline_s = time.monotonic() + limit_s
    welcomed = b""
    while (left_s := deadline_s - time.monotonic()) > 0:
        if not router.poll(int(1000 * left_s)):
            break
        peer, *frames = router.recv_multipart()
        header = decode(frames, d_model).header
        if isinstance(header, Hello) and peer != old_peer:
            welcomed = peer
            # The pause between heartbeats is short, so that a lost base station is missed soon.
            router.send_multipart([peer, *encode(Message(Welcome(PROTOCOL_VERSION, 0.1)))])
            router.send_multipart([peer, *sound])
        if isinstance(header, ExpertReply) and peer == welcomed:
            return peer, frames[1:]
    raise TimeoutError(f"no {'answer' if welcomed else 'hello'} in {limit_s:g} s")


def _peak_mib(pid: int) -> float:
    """Largest resident memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024


def _receive(router: Any, limit_s: float) -> list[bytes]:
    if not router.poll(int(1000 * limit_s)):
        raise TimeoutError("a device did not dial")
    received: list[bytes] = router.recv_multipart()
    return received


def _sound_request(service: DeviceService) -> Frames:
    entry = service.manifest.experts[0]
    request = ExpertRequest(
        request_id=77, block=entry.block, rows=1, wire="fp32", experts=(entry.expert,), counts=(1,),
        index=np.zeros(1, "<u4").tobytes(), weights=np.ones(1, "<f4").tobytes(),
    )  # fmt: skip
    rows = np.ones((1, service.manifest.model.d_model), "<f4")
    return [bytes(frame) for frame in encode(Message(request, rows))]
