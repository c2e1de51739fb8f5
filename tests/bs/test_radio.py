from __future__ import annotations

import numpy as np
import pytest

from wdmoe.bs.radio import Cell, RadioConfig, parse_radio


def test_efficiency_is_that_of_the_formula() -> None:
    config = RadioConfig(near_m=100, far_m=100, fading=False, most=99)
    down, up = Cell(config, 1, 0).efficiencies()
    loss_db = 32.4 + 20 * np.log10(3.5) + 40
    noise_dbm = -174 + 10 * np.log10(100e6)
    assert down[0] == pytest.approx(np.log2(1 + 10 ** ((40 - loss_db - noise_dbm) / 10)))  # 10 W are 40 dBm
    assert up[0] == pytest.approx(np.log2(1 + 10 ** ((10 * np.log10(200) - loss_db - noise_dbm) / 10)))
    assert Cell(RadioConfig(near_m=1, far_m=1, fading=False), 1, 0).efficiencies()[0][0] == 8.0


def test_devices_are_spread_over_the_ring_and_stay_in_it() -> None:
    cell = Cell(RadioConfig(speed=30.0), 2000, 0)
    assert np.median(cell.distance_m) == pytest.approx(np.sqrt((50**2 + 400**2) / 2), rel=0.05)
    before = cell.distance_m
    for _ in range(100):
        cell.pass_time(1.0)
        assert cell.distance_m.min() >= 50 - 1e-6 and cell.distance_m.max() <= 400 + 1e-6
    assert not np.allclose(before, cell.distance_m)


def test_fading_is_drawn_anew_and_has_mean_one() -> None:
    config = RadioConfig(near_m=400, far_m=400, most=99)
    cell = Cell(config, 20_000, 3)
    (down, _), (again, _) = cell.efficiencies(), cell.efficiencies()
    assert not np.array_equal(down, again)
    (still, _) = Cell(RadioConfig(near_m=400, far_m=400, most=99, fading=False), 1, 3).efficiencies()
    assert (2**down - 1).mean() == pytest.approx(2 ** still[0] - 1, rel=0.03)


def test_options_are_read_and_refused() -> None:
    assert parse_radio("far_m=200,fading=false,speed=1.5") == RadioConfig(far_m=200, fading=False, speed=1.5)
    for text in ("far_m=x", "fading=maybe", "depth=3", "near_m=0", "far_m=10", "speed=-1"):
        with pytest.raises(ValueError, match="radio"):
            parse_radio(text)
