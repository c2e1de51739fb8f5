"""Forecasts agree with sums done by hand wherever the routing leaves no choice, and move the right way elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from wdmoe.profiles.base_station import modelled_station
from wdmoe.profiles.forecast import PassTime, RoutedWork, Site, StationWork, Transfer, block_end, pass_time
from wdmoe.profiles.link_profile import modelled_link
from wdmoe.profiles.modelled import ExpertShape, modelled_profile

STATION = modelled_station("laptop-8-core")
SHAPE = ExpertShape(1024, 2048)
WORK = StationWork(stages=(4_000_000,) * 3, shared=0, head=30_000_000, kv_dim=256, query_dim=1024)


def site(hardware: str = "orin-nx-16gb", link: str = "wifi-5ghz-mid") -> Site:
    return Site(modelled_profile(hardware, "fp16", SHAPE), modelled_link(link))


def forecast(
    sites: list[Site], places: list[int], rows: int = 20, top_k: int = 2, shared: bool = True, work: StationWork = WORK
) -> PassTime:
    routed = RoutedWork(len(places), top_k, SHAPE.d_model)
    return pass_time(rows, rows, 100, STATION, work, routed, sites, [places] * 3, shared)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("link", ["wifi-5ghz-mid", "ethernet-1g"])
def test_one_device_that_is_always_asked_takes_what_the_formulas_say(shared: bool, link: str) -> None:
    one = site(link=link)
    found = forecast([one], [0, 0], shared=shared)
    down, up = 20 * 1024 * 2 + 40 * 8 + 150, 20 * 1024 * 2 + 150
    assert found.device_ms == pytest.approx(3 * 2 * one.profile.call_ms(20))
    assert found.air_ms == pytest.approx(3 * one.link.exchange_ms(down, up))
    stage_ms = STATION.graph_ms(4_000_000, 20, 4 * 20 * 100 * 1024, 8 * 100 * 256)
    assert found.bs_ms == pytest.approx(3 * stage_ms + STATION.graph_ms(30_000_000, 20))
    busy = one.link.down_ms(down) + one.link.up_ms(up)
    assert found.air_busy_ms == pytest.approx(3 * (busy if link != "ethernet-1g" else one.link.down_ms(down)))
    assert found.device_busy_ms == pytest.approx(found.device_ms)
    assert found.at_best_per_s >= 1000 / found.total_ms


def test_a_shared_channel_sends_the_longest_work_first_and_takes_replies_as_they_are_ready() -> None:
    def transfer(compute_ms: float, half_duplex: bool = True) -> Transfer:
        return Transfer(down_ms=2, compute_ms=compute_ms, up_ms=3, lag_ms=1, half_duplex=half_duplex)

    # Down 0-2 and 2-4; ready at 2 + 10 + 1 and 4 + 5 + 1; up 10-13 and 13-16.
    assert block_end([transfer(5), transfer(10)], shared_channel=True) == (16, 10)
    # The first is ready at 3 + 1 while the second is still sent: on one channel its reply waits until 4.
    assert block_end([transfer(0), transfer(0.5)], shared_channel=True) == (10, 0)
    assert block_end([transfer(0, False), transfer(0.5, False)], shared_channel=True) == (9.5, 0)
    assert block_end([transfer(5), transfer(10)], shared_channel=False) == (16, 10)
    assert block_end([transfer(10)] * 3, shared_channel=False) == (16, 10)
    assert block_end([], shared_channel=False) == (0, 0)


def test_a_channel_of_ones_own_is_never_slower() -> None:
    sites, places = [site() for _ in range(4)], [0, 0, 1, 1, 2, 2, 3, 3]
    for rows in (1, 8, 64):
        shared, own = (forecast(sites, places, rows, shared=channel) for channel in (True, False))
        assert own.total_ms <= shared.total_ms
        assert own.air_busy_ms < shared.air_busy_ms or rows == 1
        assert own.bs_ms == shared.bs_ms


def test_one_token_asks_at_most_as_many_devices_as_experts() -> None:
    """Top-1 of 8 on 4 devices: always exactly one call on one device."""
    one = site()
    found = forecast([one] * 4, [0, 0, 1, 1, 2, 2, 3, 3], rows=1, top_k=1)
    assert found.device_ms == pytest.approx(3 * one.profile.call_ms(1))
    assert found.device_busy_ms < found.device_ms  # it is another device each time


def test_more_rows_take_longer_and_a_better_link_less() -> None:
    places = [0, 0, 1, 1]
    times = [forecast([site(), site()], places, rows).total_ms for rows in (1, 10, 100, 1000)]
    assert times == sorted(times)
    near = forecast([site(link="wifi-6-near")] * 2, places)
    far = forecast([site(link="wifi-5ghz-far")] * 2, places)
    assert near.total_ms < far.total_ms
    assert far.bottleneck == far.busiest == "air"


def test_the_shared_expert_hides_behind_the_devices_as_far_as_it_goes() -> None:
    plain, small, large = (
        forecast([site()], [0, 0], work=dataclasses.replace(WORK, shared=weights)) for weights in (0, 1_000_000, 10**9)
    )
    assert small.total_ms == pytest.approx(plain.total_ms)
    assert small.bs_busy_ms == pytest.approx(plain.bs_busy_ms + 3 * STATION.graph_ms(1_000_000, 20))
    shared_ms = STATION.graph_ms(10**9, 20)
    assert large.total_ms == pytest.approx(plain.bs_ms + 3 * shared_ms)
    assert large.bs_busy_ms == pytest.approx(plain.bs_busy_ms + 3 * shared_ms)
    assert large.bottleneck == "BS compute"


def test_it_is_the_same_every_time() -> None:
    arguments: dict[str, Any] = {"sites": [site(), site()], "places": [0, 0, 1, 1]}
    assert forecast(**arguments) == forecast(**arguments)
