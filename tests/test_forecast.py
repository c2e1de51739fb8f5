"""The forecast of a block is what emulated devices would take for it: two accounts of the same links."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from wdmoe.profiles.forecast import Transfer, block_end
from wdmoe.profiles.link_profile import modelled_link
from wdmoe.runtime.channels import OwnChannel
from wdmoe.runtime.emulation import Emulator, Exchange


@pytest.mark.parametrize(
    ("name", "shared"),
    [("wifi-5ghz-far", True), ("wifi-6-near", True), ("wifi-5ghz-far", False), ("ethernet-1g", False)],
)
def test_a_block_ends_when_the_last_emulated_reply_would_be_there(name: str, shared: bool) -> None:
    link = msgspec.structs.replace(modelled_link(name), jitter_ms=0.0)
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        n_devices = int(rng.integers(1, 6))
        computes_ms = sorted(rng.exponential(10.0, n_devices).tolist(), reverse=True)
        sizes = rng.integers(1_000, 500_000, n_devices).tolist()
        transfers = [
            Transfer(link.down_ms(size), compute_ms, link.up_ms(size), link.exchange_ms(0, 0), link.half_duplex)
            for size, compute_ms in zip(sizes, computes_ms, strict=True)
        ]
        air = OwnChannel()
        ends = []
        for number, (size, compute_ms) in enumerate(zip(sizes, computes_ms, strict=True)):
            emulator = Emulator(link, f"{number}", air if shared and link.half_duplex else None)
            ends.append(1e3 * emulator.release(Exchange(0.0, 0.0, size, size, compute_ms)).at_s)
        ratios.append(block_end(transfers, shared)[0] / max(ends))
    if not shared:
        np.testing.assert_allclose(ratios, 1)
        return
    # The emulation settles a request and its reply together, in the order in which requests arrive; the forecast lets all
    # requests go first and replies in the order in which they are ready, which wastes no gap.
    assert 0.85 < np.mean(ratios) <= 1
    assert np.max(ratios) < 1.02
