"""A band that is divided in a live run, over the link's twin in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import inprocess
import msgspec
import numpy as np
import pytest
from inprocess import System, open_system, run_sequence

from wdmoe.bs.airtime import Medium
from wdmoe.bs.config import StationConfig
from wdmoe.bs.hub import HEARTBEAT_S
from wdmoe.bs.latency import LatencyTracker
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact
from wdmoe.bs.stages import new_cache
from wdmoe.bs.station import live_band, live_medium
from wdmoe.bs.transmitting import Division, LiveBand, shares_of_block
from wdmoe.profiles.device_profile import Emulated
from wdmoe.profiles.link_profile import LinkProfile
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.messages import ExpertRequest, Frame, Message, Ping, decode

PROMPT = list(b"How does one keep bread fresh?")
NAMES = [f"device-{k}" for k in range(4)]
ROW_BYTES = 4 * 32  # of the tiny model, float32


def link(down_mbps: float, up_mbps: float) -> LinkProfile:
    return LinkProfile("l", "", down_mbps, up_mbps, 1.0, 0.0, False, ())


LINKS = {name: link(0.1 * (k + 1), 0.2 * (k + 1)) for k, name in enumerate(NAMES)}
Sent = list[tuple[float, str, Message]]


def noted(system: System, name: str, sent: Sent) -> inprocess.Handler:
    handler = system.link.peers[name.encode()]

    def handle(frames: Sequence[Frame]) -> Iterable[Sequence[Frame]]:
        sent.append((system.clock.now_s(), name, decode([bytes(f) for f in frames], system.manifest.model.d_model)))
        return handler(frames)

    return handle


def divide(system: System, division: Division | None, medium: Medium, links: dict[str, LinkProfile] = LINKS) -> Sent:
    """Give an open system a band; return where what is sent will be noted, with when."""
    sent: Sent = []
    system.pipeline._transmitter.band = LiveBand(division, links, ROW_BYTES)
    system.pipeline._transmitter.given = medium
    system.pipeline._transmitter.splits = False
    for name in NAMES:
        system.link.peers[name.encode()] = noted(system, name, sent)
    return sent


def requests_to(sent: Sent, name: str) -> list[tuple[float, ExpertRequest]]:
    return [(at_s, m.header) for at_s, who, m in sent if who == name and isinstance(m.header, ExpertRequest)]


@pytest.mark.parametrize("division", ["uniform", "per-block", dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True))])
def test_pacing_changes_when_requests_leave_and_nothing_of_the_answers(bundle: Path, division: Division) -> None:
    with open_system(bundle) as system:
        plain = run_sequence(system, PROMPT)
        assert system.clock.now_s() == 0.0
    with open_system(bundle) as system:
        sent = divide(system, division, "pooled" if division == "per-block" else "own")
        paced = run_sequence(system, PROMPT)
    np.testing.assert_array_equal(plain, paced)
    for name in NAMES:
        asked = requests_to(sent, name)
        assert [header.request_id for _, header in asked] == sorted(header.request_id for _, header in asked)
        there_s = 0.0
        for at_s, header in asked:
            assert header.share is not None and header.up_mbps == pytest.approx(LINKS[name].up_mbps)
            alone_s = header.rows * LINKS[name].down_ms(ROW_BYTES) / 1e3
            # Whatever the window: no more is there than the share carries of the declared link.
            assert at_s + alone_s >= there_s + alone_s / header.share - 1e-9
            there_s = at_s + alone_s
    shares = [
        sum(header.share or 0.0 for name in NAMES for _, header in requests_to(sent, name) if header.block == b)
        for b in (0, 1)
    ]
    assert max(shares) <= 1 + 1e-9 and (division != "per-block" or min(shares) == pytest.approx(1.0))


def test_a_held_request_holds_up_no_ping(bundle: Path) -> None:
    slow = {name: link(1e-3, 1e-3) for name in NAMES}
    with open_system(bundle) as system:
        sent = divide(system, "uniform", "own", slow)
        run_sequence(system, PROMPT)
    at_s = [at_s for at_s, name, message in sent if name == "device-0" and isinstance(message.header, Ping)]
    assert requests_to(sent, "device-0")[-1][0] > 5 and len(at_s) > 5
    assert np.diff(at_s) == pytest.approx(HEARTBEAT_S, abs=0.01)


def test_all_who_are_asked_finish_together_on_their_part_of_the_band() -> None:
    asked = [(3.0, 1.0, 5.0, 4.0), (1.0, 0.5, 9.0, 1.0), (2.0, 2.0, 0.0, 2.0)]
    alone = shares_of_block(asked, 1)
    finish_ms = [(d + u) / share + 2 * way + c for (d, way, c, u), share in zip(asked, alone, strict=True)]
    assert sum(alone) == pytest.approx(1.0) and finish_ms == pytest.approx([finish_ms[0]] * 3)
    assert sum(shares_of_block(asked, 4)) == pytest.approx(0.25)
    assert shares_of_block([*asked, (0.0, 1.0, 1.0, 0.0)], 2) == [0.125] * 4  # nothing is known of one link
    assert shares_of_block([], 1) == []


def test_an_emulated_link_takes_the_share_and_is_charged_once(bundle: Path) -> None:
    with open_system(bundle) as system:
        for device in system.hub.devices.values():
            profile = device.latency.profile
            emulated = Emulated("orin-nano-8gb", "wifi-6-mid", 0, 32, 64, "fp16")
            profile = msgspec.structs.replace(profile, origin="emulated", emulated=emulated, row_link_ms=1.0)
            device.latency = LatencyTracker(profile)
        sent = divide(system, "uniform", "own", {})
        run_sequence(system, PROMPT)
        assert system.clock.now_s() == 0.0  # nothing is held here
        assert system.hub.devices["device-0"].latency.model().row_link_ms == pytest.approx(4.0)
    headers = [header for name in NAMES for _, header in requests_to(sent, name)]
    assert {(header.share, header.up_mbps) for header in headers} == {(0.25, None)}


def test_without_a_known_rate_nothing_is_held_and_it_is_said(bundle: Path) -> None:
    with open_system(bundle) as system:
        sent = divide(system, "uniform", "own", {})
        assert system.pipeline._transmitter.band.rateless(system.hub.devices.values()) == NAMES
        run_sequence(system, PROMPT)
    assert {header.share for name in NAMES for _, header in requests_to(sent, name)} == {None}


def test_what_the_share_adds_is_air_and_says_nothing_of_the_device(bundle: Path) -> None:
    with open_system(bundle) as system:
        sent = divide(system, "uniform", "own", {name: link(0.1, 0.2) for name in NAMES})
        cache = new_cache(system.manifest, len(PROMPT))
        ((_, _, record),) = system.pipeline.run([pack_sequence("p", PROMPT, cache, None)], Exact())
        rows = max(header.rows for name in NAMES for _, header in requests_to(sent, name) if header.block == 0)
        # The network of this test takes no time itself: what is left is what three quarters of the band would have saved.
        assert record.blocks[0].air_ms == pytest.approx(3 * rows * link(0.1, 0.2).row_ms(ROW_BYTES), rel=1e-3)
        assert record.blocks[0].queue_ms == 0.0
        system.pipeline.idle(0.0)
        assert system.hub.devices["device-0"].latency.model().correction < 1.0


@pytest.mark.parametrize(
    ("options", "medium"),
    [
        ({}, None),
        ({"channel": "shared"}, "shared"),
        ({"channel": "orthogonal"}, "own"),
        ({"bandwidth": "uniform"}, "own"),
        ({"bandwidth": "per-block"}, "pooled"),
        ({"bandwidth": "static"}, "own"),
        ({"bandwidth": "0.1,0.2,0.3,0.4"}, "own"),
    ],
)
def test_options_say_what_the_medium_is(options: dict[str, str], medium: Medium | None) -> None:
    assert live_medium(StationConfig(**options)) == medium  # type: ignore[arg-type]


def test_static_shares_are_those_of_virtual_time_and_need_rates(bundle: Path) -> None:
    pytest.importorskip("scipy")
    slow_last = ("wifi-6-near", "wifi-6-near", "wifi-6-near", "wifi-6-far")
    with open_system(bundle) as system:
        config = StationConfig(bandwidth="static", links=slow_last)
        shares = live_band(config, system.hub, system.manifest).division
        assert isinstance(shares, dict) and list(shares) == NAMES
        assert 0.999 < sum(shares.values()) <= 1 and max(shares, key=lambda name: shares[name]) == "device-3"
        with pytest.raises(WdmoeError, match="the link of device-0 carries is not known; give --link"):
            live_band(StationConfig(bandwidth="static"), system.hub, system.manifest)


def test_what_cannot_be_divided_is_refused_by_name(bundle: Path) -> None:
    for options, reason in (
        ({"channel": "shared", "bandwidth": "uniform"}, "leave one of them out"),
        ({"in_flight": "auto", "bandwidth": "per-block"}, "give --in-flight a number"),
        ({"bandwidth": "0.5,0.6"}, "sum to at most 1"),
        ({"bandwidth": "half"}, "expected uniform, static, per-block, or numbers"),
        ({"links": ("string",)}, "no link is called 'string'"),
    ):
        with pytest.raises(ValueError, match=reason):
            StationConfig(**options)
    with open_system(bundle) as system:
        for config, reason in (
            (StationConfig(links=("wifi-6", "wifi-6")), "2 links for 4 devices"),
            (StationConfig(bandwidth="0.5,0.5"), "2 shares for 4 devices"),
        ):
            with pytest.raises(ValueError, match=reason):
                live_band(config, system.hub, system.manifest)
        band = live_band(StationConfig(bandwidth="0.1,0.2,0.3,0.4", links=("wifi-6",)), system.hub, system.manifest)
        assert band.division == dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True)) and list(band.links) == NAMES
        profile = system.hub.devices["device-2"].latency.profile
        shared = Emulated("orin-nano-8gb", "wifi-6-mid", 0, 32, 64, "fp16", shared=True)
        system.hub.devices["device-2"].latency.profile = msgspec.structs.replace(
            profile, origin="emulated", emulated=shared
        )
        with pytest.raises(WdmoeError, match="device-2 is emulated on a channel that all share"):
            live_band(StationConfig(bandwidth="uniform"), system.hub, system.manifest)
