"""Damaged frames for decoding, a device and a base station inside one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from inprocess import System, make_service, open_system, run_sequence

from fuzzing.frames import PROMPT, Frames, Tally, damaged
from fuzzing.lawful import lawful
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.errors import ProtocolError
from wdmoe.runtime.links import Parcel
from wdmoe.runtime.messages import (
    ExpertRequest,
    decode,
    encode,
)


def fuzz_decoding(rng: np.random.Generator, corpus: Sequence[Frames], d_model: int, count: int, tally: Tally) -> None:
    """Decode damaged frames: each is refused by a ProtocolError, or is a lawful message."""
    for _ in range(count):
        frames = damaged(rng, corpus)
        kind = lawful(frames, d_model)
        tally.counts["frames"] += 1
        try:
            message = decode(frames, d_model)
        except ProtocolError as error:
            tally.counts["refused"] += 1
            tally.counts["lawful_refused"] += kind is not None and kind != "hello"  # a profile has rules of its own
            if len(str(error)) > 4000:
                tally.crash("decode", ValueError(f"a refusal of {len(str(error))} characters"))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crash("decode", error)
        else:
            tally.counts["understood"] += 1
            if kind is None:
                tally.accept(f"decode took {type(message.header).__name__}: {frames[0][:200]!r}")


def fuzz_service(rng: np.random.Generator, corpus: Sequence[Frames], folder: Path, count: int, tally: Tally) -> None:
    """Throw damaged frames at a device: it answers lawfully or not at all, and runs only what it holds."""
    service = make_service(folder, VirtualClock())
    d_model = service.manifest.model.d_model
    held = {(entry.block, entry.expert) for entry in service.manifest.experts}
    for _ in range(count):
        frames = damaged(rng, corpus)
        tally.counts["frames"] += 1
        service.refused, service.welcomed = None, True
        try:
            try:
                message = decode(frames, d_model)
            except ProtocolError as error:
                tally.counts["refused"] += 1
                answers = service.on_malformed(error)
            else:
                tally.counts["understood"] += 1
                answers, job = service.on_message(message)
                if job is not None:
                    header = message.header
                    if not isinstance(header, ExpertRequest) or any(
                        (header.block, e) not in held for e in header.experts
                    ):
                        tally.accept(f"a device runs {frames[0][:200]!r}")
                    answers = [*answers, job.run()]
            for answer in answers:
                if lawful([bytes(frame) for frame in encode(answer)], d_model) is None:
                    tally.crash("device", ValueError(f"an answer that is no message: {str(answer.header)[:200]}"))
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            tally.crash("device", error)


class _Friends:
    """A roster in memory: the key of a device is its name."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def name_of(self, key: str | None) -> str | None:
        return key if key in self.names else None

    def why_not(self, key: str | None) -> str:
        return "unknown key"

    def enrol(self, device: str, secret: bytes, key: str | None) -> str | None:
        return "this token is unknown or was spent"


class _NoisyLink:
    """The link of a system with strangers on it, and with devices that stutter."""

    def __init__(self, system: System, rng: np.random.Generator, corpus: Sequence[Frames], tally: Tally) -> None:
        self._inner, self._rng, self._corpus, self._tally = system.link, rng, corpus, tally
        self._d_model = system.manifest.model.d_model
        self._old: list[tuple[bytes, Frames]] = []  # replies, with who sent them
        self.left = 0  # frames to throw in

    def exchange(self, outgoing: Iterable[Parcel], timeout_s: float) -> list[Parcel]:
        arrived: list[Parcel] = []
        for parcel in self._inner.exchange(outgoing, timeout_s):
            arrived.append(Parcel(parcel.peer, parcel.frames, parcel.peer.decode()))
            frames = [bytes(frame) for frame in parcel.frames]
            if parcel.peer.startswith(b"device-") and len(frames) == 2:
                self._old = [*self._old[-50:], (parcel.peer, frames)]
        for _ in range(min(self.left, 40)):
            self.left -= 1
            self._tally.counts["frames"] += 1
            arrived.insert(int(self._rng.integers(len(arrived) + 1)), self._noise())
        return arrived

    def _noise(self) -> Parcel:
        rng = self._rng
        kind = int(rng.integers(6))
        if kind < 3:  # a stranger: with something damaged, or with what it heard others say
            frames = damaged(rng, self._corpus) if kind else list(self._corpus[int(rng.integers(len(self._corpus)))])
            peer = f"stranger-{rng.integers(1000)}".encode()
            return Parcel(peer, frames, None if rng.random() < 0.3 else "stranger's key")
        if kind == 3 and self._old:  # a device repeats itself; the same frames may also come before their turn
            peer, frames = self._old[int(rng.integers(len(self._old)))]
            return Parcel(peer, frames, peer.decode())
        if kind == 4 and self._old:  # a device answers what another was asked, or nobody
            _, frames = self._old[int(rng.integers(len(self._old)))]
            header = msgspec.msgpack.decode(frames[0])
            owner = int(rng.integers(4))
            header["request_id"] = 2**31 - 1 - int(rng.integers(1000))
            return Parcel(f"device-{owner}".encode(), [msgspec.msgpack.encode(header), frames[1]], f"device-{owner}")
        while lawful(frames := damaged(rng, self._corpus), self._d_model) is not None:
            pass
        name = f"device-{rng.integers(4)}"
        return Parcel(name.encode(), frames, name)

    def wake(self) -> None:
        self._inner.wake()

    def redial(self) -> None:
        self._inner.redial()

    def close(self) -> None:
        self._inner.close()


def fuzz_base_station(
    rng: np.random.Generator, corpus: Sequence[Frames], bundle: Path, count: int, tally: Tally
) -> None:
    """Throw damaged frames at a base station while it works: its answers keep their bits, its devices their places."""
    with open_system(bundle) as system:
        expected = run_sequence(system, PROMPT)
        hub = system.hub
        for device in hub.devices.values():
            device.key = device.name
        hub._roster = _Friends(hub.devices)
        noisy = _NoisyLink(system, rng, corpus, tally)
        hub._link = noisy
        places = {name: (device.peer, device.session) for name, device in hub.devices.items()}
        noisy.left = count
        while noisy.left:
            try:
                logits = run_sequence(system, PROMPT)
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                tally.crash("base station", error)
                noisy.left -= min(noisy.left, 40)
                continue
            tally.counts["runs"] += 1
            if not np.array_equal(logits, expected):
                tally.accept(f"a run answers otherwise, by {np.abs(logits - expected).max():.1e}")
            if places != {name: (device.peer, device.session) for name, device in hub.devices.items()}:
                tally.accept(f"devices are now {sorted(hub.devices)}")
        tally.counts["refused"] += sum(hub.refused.counts.values())
        tally.counts["late_replies"] += system.pipeline.requests.late_replies
