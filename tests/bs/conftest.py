from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from inprocess import make_service

from wdmoe.device.serving import serve
from wdmoe.runtime.clock import RealClock
from wdmoe.runtime.links import dial, listen
from wdmoe.runtime.stopping import StopFlag
from wdmoe.runtime.worker import ThreadWorker


@pytest.fixture
def address(bundle: Path) -> Iterator[str]:
    """Four devices on threads of this process that dial a free port over loopback."""
    probe = listen("tcp://127.0.0.1:0", 1 << 20)
    chosen = probe.address
    probe.close()
    stop = StopFlag()
    links, threads = [], []
    for k in range(4):
        service = make_service(bundle / f"device-{k}", RealClock())  # type: ignore[arg-type]
        link = dial(chosen, 1 << 20)
        worker: ThreadWorker = ThreadWorker("engine", link.wake)  # type: ignore[type-arg]
        threads.append(threading.Thread(target=serve, args=(service, link, worker, stop, lambda _: None)))
        threads[-1].start()
        links.append((link, worker))
    yield chosen
    stop.set()
    for thread, (link, worker) in zip(threads, links, strict=True):
        link.wake()
        thread.join()
        worker.close()
        link.close()
