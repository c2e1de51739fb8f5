"""An encrypted base station at work with four enrolled devices, in one process over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from inprocess import make_service
from processes import free_address

from wdmoe.bs.config import StationConfig
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact
from wdmoe.bs.roster import BS_KEY_NAME, ROSTER_NAME, FileRoster
from wdmoe.bs.routing import Floats
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import Station, open_station
from wdmoe.device.service import DeviceService
from wdmoe.device.serving import serve
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.keys import KeyPair, make_key
from wdmoe.runtime.links import dial
from wdmoe.runtime.messages import Message
from wdmoe.runtime.stopping import StopFlag
from wdmoe.runtime.worker import ThreadWorker

PROMPT = list(b"Who goes there?")


@dataclass(frozen=True, slots=True)
class Guarded:
    """What a test may look at, and what it needs to let others try."""

    bundle: Path
    keys: Path
    roster: FileRoster
    bs_public: str
    station: Station
    expected: Floats

    def run(self) -> None:
        """One run by the devices that are welcome: its answer must not have changed."""
        np.testing.assert_allclose(answer(self.station), self.expected, atol=1e-5)

    def enrolled_key(self, name: str) -> KeyPair:
        """Make a key and put it on the roster."""
        pair = make_key(self.keys / f"{name}.key")
        assert self.roster.enrol(name, self.roster.invite(name, self.bs_public).secret, pair.public) is None
        return pair


@contextmanager
def open_guarded(bundle: Path, keys: Path) -> Iterator[Guarded]:
    """Open it; `keys` is an empty folder."""
    station_key, roster = make_key(keys / BS_KEY_NAME), FileRoster(keys / ROSTER_NAME)
    config = StationConfig(bundle=bundle, listen=free_address(), encrypt=True, keys=keys, wire="fp32", threads=1)
    with ExitStack() as stack:
        for k in range(4):
            name = f"device-{k}"
            own = make_key(keys / f"{name}.key")
            assert roster.enrol(name, roster.invite(name, station_key.public).secret, own.public) is None
            service = make_service(bundle / name, RealClock())  # type: ignore[arg-type]
            stack.enter_context(served(service, config.listen, [], own, station_key.public))
        station = stack.enter_context(open_station(config, lambda _: None))
        yield Guarded(bundle, keys, roster, station_key.public, station, answer(station))


@contextmanager
def served(
    service: DeviceService, address: str, words: list[str], own: KeyPair | None = None, bs_public: str | None = None
) -> Iterator[threading.Thread]:
    """Let a device serve on a thread; its last words go where the command would print them."""
    link, stop = dial(address, 1 << 20, own, bs_public), StopFlag()
    worker: ThreadWorker[Message] = ThreadWorker("engine", link.wake)

    def run() -> None:
        try:
            serve(service, link, worker, stop, lambda _: None)
        except WdmoeError as error:
            words.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        link.wake()
        thread.join()
        worker.close()
        link.close()


def answer(station: Station) -> Floats:
    """Run one prompt."""
    microbatch = pack_sequence("prompt", PROMPT, new_cache(station.manifest, len(PROMPT)), None, all_logits=True)
    ((_, result, _),) = station.pipeline.run([microbatch], Exact())
    assert result.logits is not None
    return result.logits
