"""Texts written through real device processes, one of which is killed in the middle."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from processes import device_processes, free_address

from wdmoe.bs.config import StationConfig
from wdmoe.bs.fleet import Health
from wdmoe.bs.generation import CachedModel, Completion, Writer, load_tokenizer
from wdmoe.bs.policies import Exact
from wdmoe.bs.sampling import Sampling
from wdmoe.bs.station import Station, open_station

PROMPT = list(b"How does one keep bread fresh?")
TOKENS, KILLED_AT = 32, 8
DEVICES = [f"{kind}-{k}" for kind in ("device", "replica") for k in range(4)]


def write(station: Station, on_token: Callable[[int], None]) -> Completion:
    model = CachedModel(station.pipeline, station.manifest.model, Exact())
    writer = Writer(model, load_tokenizer(station.folder, station.manifest), (), station.hub.clock)
    numbers = iter(range(TOKENS))

    def never() -> bool:
        on_token(next(numbers))
        return False

    sampling = Sampling(max_tokens=TOKENS)
    return writer.answer(PROMPT, sampling, sampling.rng(), cancelled=never)


def turn_until(station: Station, is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline_s
        station.pipeline.idle(0.05)


def test_a_text_survives_the_death_of_a_device_in_its_middle(bundle: Path) -> None:
    address = free_address()
    config = StationConfig(bundle=bundle, listen=address, wire="fp32", threads=1, wait_s=30)
    options = ("--engine", "numpy")
    with (
        device_processes(bundle, address, options) as devices,
        device_processes(bundle, address, options, kind="replica") as replicas,
        open_station(config, lambda _: None) as station,
    ):
        turn_until(station, lambda: sorted(station.hub.devices) == DEVICES)
        processes = dict(zip(DEVICES, [*devices, *replicas], strict=True))
        requests = station.pipeline.requests
        expected = write(station, lambda number: None)
        killed: list[str] = []
        asked_others: list[int] = []

        def kill(number: int) -> None:
            if number == KILLED_AT:
                used = requests.preferred(0, 2)
                assert used in ("device-1", "replica-1")
                killed.append(used)
                asked_others.append(requests.counts["replaced"] + requests.counts["hedged"])
                processes[used].kill()

        completion = write(station, kill)
        (victim,) = killed
        assert processes[victim].wait(10) == -signal.SIGKILL
        assert completion.token_ids == expected.token_ids and len(completion.token_ids) == TOKENS
        assert completion.text == expected.text

        # It was missed, another was asked, and once it has been silent for long enough it counts as lost.
        assert requests.counts["replaced"] + requests.counts["hedged"] > asked_others[0]
        fleet = requests.fleet
        assert fleet.of(victim).health is not Health.HEALTHY
        turn_until(station, lambda: not fleet.usable(victim))
        assert "silent for" in fleet.of(victim).reason
        assert write(station, lambda number: None).token_ids == expected.token_ids
