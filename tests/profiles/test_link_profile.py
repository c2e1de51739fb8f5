from __future__ import annotations

import pytest

from wdmoe.profiles.link_profile import ALIASES, link_names, modelled_link


@pytest.mark.parametrize("name", link_names())
def test_every_link_is_labelled_and_names_a_source_for_each_value(name: str) -> None:
    link = modelled_link(name)
    assert link.name == ALIASES.get(name, name)
    assert link.origin == "modelled" and len(link.sources) == 4
    assert link.half_duplex == link.name.startswith("wifi")


def test_bytes_take_their_time_both_ways() -> None:
    link = modelled_link("wifi-5ghz-far")
    assert link.down_ms(78_000_000 / 8) == pytest.approx(1000)
    assert link.exchange_ms(9750, 19500) == pytest.approx(5.0 + 1.0 + 2.0 + 0.6931 * 2.0, rel=1e-4)


@pytest.mark.parametrize("family", ["wifi-5ghz", "wifi-6"])
def test_farther_is_slower_in_every_way(family: str) -> None:
    near, mid, far = (modelled_link(f"{family}-{quality}") for quality in ("near", "mid", "far"))
    assert near.down_mbps > mid.down_mbps > far.down_mbps and near.up_mbps > mid.up_mbps > far.up_mbps
    assert near.round_trip_ms < mid.round_trip_ms < far.round_trip_ms
    assert near.jitter_ms < mid.jitter_ms < far.jitter_ms


def test_an_unknown_link_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"expected one of wifi-5ghz-near.*ethernet-1g"):
        modelled_link("smoke signals")


def test_a_radio_channel_is_bandwidth_times_efficiency_and_says_what_is_wrong_with_it() -> None:
    link = modelled_link("radio:mhz=20:efficiency=5:rtt_ms=3:jitter_ms=0.5")
    assert (link.down_mbps, link.up_mbps, link.round_trip_ms, link.jitter_ms) == (100, 100, 3, 0.5)
    assert link.half_duplex and link.origin == "modelled" and link.row_ms(8192) == pytest.approx(2 * 8192 * 8 / 100e3)
    for text in ("radio:mhz=20", "radio:mhz=20:efficiency=x", "radio:mhz=0:efficiency=1", "radio:ghz=1:efficiency=1"):
        with pytest.raises(ValueError, match="radio"):
            modelled_link(text)
