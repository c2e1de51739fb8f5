"""Requests in pieces: when they pay, that they ask for the same, and what becomes of them when a device fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import inprocess
import numpy as np
import pytest
import tiny
from inprocess import System, open_system, run_sequence

from wdmoe.bs.airtime import Asked, few_finish_ms
from wdmoe.bs.chunking import LEAST_ROWS, Turn, finish_ms, pieces_of_block, split_options
from wdmoe.bs.config import StationConfig, VirtualConfig
from wdmoe.bs.dispatch import Shipment, entries, in_pieces, split_by_device
from wdmoe.bs.fleet import Health
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact
from wdmoe.bs.records import Record
from wdmoe.bs.routing import Floats, Plan, route
from wdmoe.bs.stages import new_cache
from wdmoe.bs.transmitting import Transmitter
from wdmoe.bs.virtual import open_virtual_station
from wdmoe.export.bundle import ExportConfig, export_bundle, plan_export
from wdmoe.profiles.modelled import ExpertShape
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Frame,
    Goodbye,
    Hello,
    Message,
    decode,
    encode,
)

PROMPT = list(b"How does one keep bread fresh for a week?")


def device(row_ms: float, call_ms: float, call_row_ms: float, way_ms: float = 1.0) -> list[Asked]:
    """Return the options of 64 rows: each on the air both ways, and one expert that all of them want."""

    def ask(counts: Sequence[int], rows: int) -> Asked:
        return rows * row_ms, way_ms, sum(call_ms + count * call_row_ms for count in counts), rows * row_ms

    return split_options([64], 64, ask)


def test_whole_requests_are_done_when_the_latency_model_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked: list[Asked] = [tuple(rng.uniform(0, 9, 4)) for _ in range(3)]
        done_ms, order = few_finish_ms(asked, "shared")
        assert finish_ms([(asked[k], 1) for k in order]) == pytest.approx(max(done_ms))
        assert finish_ms([(asked[0], 1)]) == pytest.approx(few_finish_ms(asked[:1], "own")[0][0])


def test_pieces_pay_where_computing_takes_as_long_as_the_way() -> None:
    # 64 ms down, 64 ms of computing, 64 ms up, 1 ms each way: whole 194. In four pieces the channel is never idle: all
    # four are down at 64; three are computed by then, and the last by 81; replies from 64 on, 4 x 16; the way back.
    balanced = device(1.0, 0.0, 1.0)
    assert finish_ms([(balanced[0], 1)]) == pytest.approx(194)
    assert finish_ms([(balanced[3], 4)]) == pytest.approx(64 + 64 + 1)
    assert pieces_of_block([balanced], "own", [False]) == [4]
    reading = device(1.0, 64.0, 0.01)  # each piece reads all the weights again
    assert pieces_of_block([reading], "own", [False]) == [1]
    assert pieces_of_block([device(0.001, 0.0, 1.0)], "own", [False]) == [1]  # nothing travels
    assert pieces_of_block([device(1.0, 0.0, 0.01)], "own", [False]) == [1]  # nothing is computed
    assert pieces_of_block([device(0.005, 0.0, 0.005, 0.01)], "own", [False]) == [1]  # not worth a message


def test_over_a_wire_replies_need_not_wait_for_the_last_piece() -> None:
    quick = device(1.0, 0.0, 0.01)  # 64 ms down, 0.64 ms of computing, 64 ms up
    assert finish_ms([(quick[3], 4)], duplex=True) == pytest.approx(64 + 0.16 + 16 + 2)
    assert pieces_of_block([quick], "own", [True]) == [4] and pieces_of_block([quick], "own", [False]) == [1]


def test_few_rows_stay_together() -> None:
    def ask(counts: Sequence[int], rows: int) -> Asked:
        return 10.0 * rows, 0.0, 10.0 * sum(counts), 10.0 * rows

    assert len(split_options([2 * LEAST_ROWS - 1], 2 * LEAST_ROWS - 1, ask)) == 1
    assert len(split_options([2 * LEAST_ROWS], 2 * LEAST_ROWS, ask)) == 2


def test_only_who_would_be_last_is_split_and_not_where_others_fill_the_air() -> None:
    short = [tuple(part / 4 for part in asked) for asked in device(1.0, 0.0, 1.0)]
    assert pieces_of_block([short, device(1.0, 0.0, 1.0)], "own", [False, False]) == [1, 4]  # type: ignore[list-item]
    # On one channel two such devices hide each other's computing: what is left to gain is small.
    many = [device(1.0, 0.0, 1.0) for _ in range(6)]
    assert pieces_of_block(many, "shared", [False] * 6) == [1] * 6
    assert pieces_of_block(many[:1], "shared", [False]) == [4]


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_pieces_ask_for_the_same(pieces: int) -> None:
    rng = np.random.default_rng(pieces)
    routing = route(rng.standard_normal((37, 8)).astype(np.float32), 3, True)
    hidden = rng.standard_normal((37, 4)).astype(np.float32)
    keep = rng.random(routing.experts.shape) < 0.7
    plan, names = Plan(keep, routing.weights * keep), ("a", "b")
    for shipment in split_by_device(5, routing, plan, np.arange(8) % 2, names, hidden, "fp32"):
        parts = in_pieces(shipment, pieces)
        for part in parts:
            decode([bytes(frame) for frame in encode(part.message())], 4)  # what a device checks
            np.testing.assert_array_equal(part.packed, hidden[part.rows])
        np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), shipment.rows)
        assert len(parts) == pieces and max(len(p.rows) for p in parts) - min(len(p.rows) for p in parts) <= 1
        assert sorted(pair for part in parts for pair in asked_of(part)) == sorted(asked_of(shipment))


def asked_of(shipment: Shipment) -> list[tuple[int, int, float]]:
    return [(int(shipment.rows[row]), int(e), float(w)) for e, row, w in zip(*entries(shipment.request), strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, all of whose experts are on one device."""
    folder = tmp_path_factory.mktemp("alone")
    config = ExportConfig(folder / "bundle", devices=1)
    return export_bundle(plan_export(tiny.tiny_checkpoint(folder / "c", "mixtral"), "mixtral", config), config).out


@pytest.mark.parametrize(
    ("channel", "bandwidth"), [("shared", None), ("orthogonal", "uniform"), ("orthogonal", "per-block")]
)
def test_a_long_prompt_is_sooner_in_pieces_with_the_same_answer(
    alone: Path, channel: str, bandwidth: str | None
) -> None:
    virtual = VirtualConfig(
        ("orin-nano-8gb",), ("radio:mhz=100:efficiency=6:rtt_ms=1",), cost_shape=ExpertShape(4096, 14336),
        cost_precision="int4", channel=channel, bandwidth=bandwidth, stage_ms=0.0,  # type: ignore[arg-type]
    )  # fmt: skip

    def run(split: str) -> tuple[Floats, Record]:
        config = StationConfig(alone, threads=1, wire="fp32", split=split)  # type: ignore[arg-type]
        with open_virtual_station(config, virtual, lambda text: None) as station:
            cache = new_cache(station.manifest, len(PROMPT) * 6)
            microbatch = pack_sequence("prompt", PROMPT * 6, cache, None, all_logits=True)
            ((_, result, record),) = station.pipeline.run([microbatch], Exact())
            assert result.logits is not None
            return result.logits, record

    (whole, slow), (pieces, fast) = run("none"), run("auto")
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    requests = [record.devices["device-0"].requests for record in (slow, fast)]
    assert requests[0] == 2 and requests[1] > 2  # blocks
    assert fast.latency_ms < 0.9 * slow.latency_ms
    # The same rows, and nothing more than a header for each further piece.
    assert [sum(block.bytes_down for block in record.blocks) for record in (slow, fast)] == [2 * 246 * 32 * 4] * 2


def in_three(shipments: Sequence[Shipment], alone: bool) -> list[Turn]:
    return [Turn(n, 3) for n in range(len(shipments))]


def complains(message: Message) -> Message:
    header = message.header
    return Message(ErrorReport("out of memory", header.request_id)) if isinstance(header, ExpertReply) else message


def leaves(message: Message) -> Message:
    return Message(Goodbye("power off")) if isinstance(message.header, ExpertReply) else message


def vanishes(message: Message) -> Message | None:
    return None


@pytest.mark.parametrize("edit", [complains, leaves, vanishes])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_replica_takes_over_all_pieces_of_a_device_that_fails_between_them(
    bundle: Path, edit: Callable[[Message], Message | None], after: int
) -> None:
    with open_system(bundle, replicas=[3]) as system:
        expected = run_sequence(system, PROMPT)
        system.pipeline._on_dispatch = in_three
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        answered = [0]

        def breaks(message: Message) -> Message | None:
            answered[0] += isinstance(message.header, ExpertReply)
            return message if answered[0] <= after else edit(message)

        handler = system.link.peers[b"device-3"]
        system.link.peers[b"device-3"] = inprocess.edited(handler, system.manifest.model.d_model, breaks)
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        requests = system.pipeline.requests
        assert requests.fleet.of("device-3").health is not Health.HEALTHY
        if edit is not vanishes:  # that one is hedged before it is lost
            assert requests.counts["replaced"] == 1 and requests.fleet.of("device-3").health is Health.BLOCKED


def test_pieces_that_are_out_are_asked_again_of_a_device_that_starts_again(bundle: Path) -> None:
    with open_system(bundle) as system:
        expected = run_sequence(system, PROMPT)
        system.pipeline._on_dispatch = in_three
        handler, service = system.link.peers[b"device-3"], system.services["device-3"]
        answered = [0]

        def restarts(frames: Sequence[Frame]) -> Iterable[Sequence[Frame]]:
            if isinstance(decode(frames, system.manifest.model.d_model).header, ExpertRequest):
                answered[0] += 1
                if answered[0] == 2:  # the second piece is lost with the device, which is back at once
                    return [encode(message) for message in service.on_tick()] or [encode(Message(hello))]
            return handler(frames)

        hello = Hello(
            PROTOCOL_VERSION, "device-3", service.session, system.manifest.bundle_id,
            system_experts(system), system.hub.devices["device-3"].latency.profile,
        )  # fmt: skip
        system.link.peers[b"device-3"] = restarts
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        assert answered[0] > 2 and system.pipeline.requests.counts["replaced"] == 0


def system_experts(system: System) -> tuple[tuple[int, ...], ...]:
    held = system.hub.devices["device-3"].experts
    model = system.manifest.model
    return tuple(tuple(e for e in range(model.n_experts) if (block, e) in held) for block in range(model.n_blocks))


def test_the_parts_of_a_request_in_pieces_add_up(alone: Path) -> None:
    virtual = VirtualConfig(
        ("orin-nano-8gb",), ("radio:mhz=100:efficiency=6:rtt_ms=1",), cost_shape=ExpertShape(4096, 14336),
        cost_precision="int4", stage_ms=0.0,
    )  # fmt: skip
    with open_virtual_station(StationConfig(alone, threads=1), virtual, lambda text: None) as station:
        microbatch = pack_sequence("prompt", PROMPT * 6, new_cache(station.manifest, len(PROMPT) * 6), None)
        ((_, _, record),) = station.pipeline.run([microbatch], Exact())
        correction = station.hub.devices["device-0"].latency.model().correction
    use = record.devices["device-0"]
    assert use.requests > 2 and use.rows == 2 * 6 * len(PROMPT)
    for block in record.blocks:
        assert block.queue_ms == 0 and block.device_ms + block.air_ms == pytest.approx(block.waiting_ms, rel=1e-6)
    assert sum(block.device_ms for block in record.blocks) == pytest.approx(use.compute_ms)
    assert correction == pytest.approx(1, abs=0.05)  # the device is as fast as it says


def test_pieces_say_nothing_about_the_link(bundle: Path) -> None:
    with open_system(bundle) as system:
        tracker = system.hub.devices["device-0"].latency
        system.pipeline._on_dispatch = in_three
        run_sequence(system, PROMPT)
        assert tracker.ratios and not tracker.rows_air_ms
        system.pipeline._on_dispatch = lambda shipments, alone: [Turn(n) for n in range(len(shipments))]
        run_sequence(system, PROMPT)
        assert tracker.rows_air_ms


@pytest.mark.parametrize(("told_by", "learns", "pieces"), [("operator", False, True), ("requests", False, False), ("requests", True, True), ("nobody", True, False)])  # fmt: skip
def test_learnt_rates_count_only_on_a_network(bundle: Path, told_by: str, learns: bool, pieces: bool) -> None:
    with open_system(bundle) as system:
        transmitter = Transmitter(system.hub, learns=learns)
        shipments: list[Shipment] = []

        def dispatch(asked: Sequence[Shipment], alone: bool) -> Sequence[Turn]:
            shipments.extend(asked)
            return transmitter.dispatch(asked, alone)

        system.pipeline._on_dispatch = dispatch
        run_sequence(system, PROMPT * 6)
        for device in system.hub.devices.values():
            device.latency.row_air_ms, device.latency.air_from = (1.0, 1.0), told_by  # type: ignore[assignment]
            device.latency._curve = ((1, 1.0), (1024, 1024.0))  # a row is computed about as long as it is on its way
            device.latency._call_ms.clear()
            device.latency.compute_ratios.clear()
        turns = transmitter.dispatch(shipments[:4], True)
        assert any(turn.pieces > 1 for turn in turns) == pieces
        assert all(turn.pieces == 1 for turn in transmitter.dispatch(shipments[:4], False))
