from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from inprocess import make_service

from wdmoe.device.service import DeviceService
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.engines.numpy_engine import NumpyEngine
from wdmoe.runtime.errors import ProtocolError
from wdmoe.runtime.messages import (
    PROTOCOL_VERSION,
    ErrorReport,
    ExpertReply,
    ExpertRequest,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
)


@pytest.fixture
def service(bundle: Path) -> DeviceService:
    return make_service(bundle / "device-1", VirtualClock())


def request(service: DeviceService, experts: tuple[int, ...], index: list[list[int]], weights: list[float]) -> Message:
    rows = np.random.default_rng(0).standard_normal((3, service.manifest.model.d_model)).astype(np.float32)
    flat = np.array([row for part in index for row in part], "<u4")
    counts = tuple(len(part) for part in index)
    header = ExpertRequest(
        request_id=5, block=1, rows=3, wire="fp32", experts=experts, counts=counts, index=flat.tobytes(),
        weights=np.array(weights, "<f4").tobytes(),
    )  # fmt: skip
    return Message(header, rows)


def test_a_reply_is_the_weighted_sum_over_the_devices_experts(service: DeviceService) -> None:
    message = request(service, (2, 3), [[0, 2], [1, 2]], [0.5, 0.25, 2.0, 0.75])
    _, job = service.on_message(message)
    assert job is not None
    assert job.expected_ms == 2 * service.profile.call_ms(2) > 0
    reply = job.run()
    assert isinstance(reply.header, ExpertReply) and reply.header.request_id == 5 and message.rows is not None
    engine, rows = service.engine, message.rows
    two, three = (engine.run(1, expert, rows) for expert in (2, 3))
    expected = np.stack([0.5 * two[0], 2.0 * three[1], 0.25 * two[2] + 0.75 * three[2]])
    assert reply.rows is not None
    np.testing.assert_allclose(reply.rows, expected, rtol=1e-5, atol=1e-6)


def test_an_expert_that_it_does_not_hold_is_refused(service: DeviceService) -> None:
    answers, job = service.on_message(request(service, (0,), [[0]], [1.0]))
    assert job is None
    assert answers[0].header == ErrorReport("expert 0 of block 1 is not in this slice", 5)


def test_a_failing_engine_is_reported_with_the_request(service: DeviceService) -> None:
    class Broken(NumpyEngine):
        def run(self, block: int, expert: int, rows: np.ndarray) -> np.ndarray:
            raise MemoryError("no memory left")

    service.engine = Broken(Path(), [], 1)
    _, job = service.on_message(request(service, (2,), [[0]], [1.0]))
    assert job is not None
    assert job.run().header == ErrorReport("MemoryError: no memory left", 5)


def test_it_says_hello_until_it_is_welcome_and_again_when_the_base_station_falls_silent(bundle: Path) -> None:
    clock = VirtualClock()
    service = make_service(bundle / "device-0", clock)
    (hello,) = service.on_tick()
    assert isinstance(hello.header, Hello) and hello.header.experts == ((0, 1), (0, 1))
    assert service.on_tick() == []  # not more often than it must
    clock.advance(0.6)
    assert len(service.on_tick()) == 1
    service.on_message(Message(Welcome(PROTOCOL_VERSION, 1.0)))
    clock.advance(5.0)
    assert service.welcomed and service.on_tick() == []
    clock.advance(20.0)
    assert len(service.on_tick()) == 1 and not service.welcomed


def test_a_goodbye_makes_it_look_for_the_next_base_station(service: DeviceService) -> None:
    service.on_message(Message(Welcome(PROTOCOL_VERSION, 1.0)))
    assert service.on_message(Message(Goodbye("done"))) == ([Message(Goodbye("heard"))], None)
    assert service.on_tick() == []  # not on this connection
    service.clock.advance(1.0)  # type: ignore[attr-defined]
    assert len(service.on_tick()) == 1


def test_a_ping_is_answered_at_once(service: DeviceService) -> None:
    assert service.on_message(Message(Ping(9))) == ([Message(Pong(9))], None)


def test_another_protocol_is_refused_for_good(service: DeviceService) -> None:
    service.on_message(Message(Welcome(PROTOCOL_VERSION + 1, 1.0)))
    there, here = PROTOCOL_VERSION + 1, PROTOCOL_VERSION
    assert service.refused == f"the base station speaks protocol {there}, this device {here}"
    assert service.on_tick() == []


def test_only_a_final_error_ends_it(service: DeviceService) -> None:
    service.on_message(Message(ErrorReport("not known here, say hello first")))
    assert service.refused is None and not service.welcomed
    assert service.notice == "not known here, say hello first"
    service.on_message(Message(ErrorReport("serves another bundle", final=True)))
    assert service.refused == "serves another bundle"


def test_a_message_that_only_devices_send_is_answered_with_an_error(service: DeviceService) -> None:
    answers, job = service.on_message(Message(Pong(1)))
    assert job is None and answers == [Message(ErrorReport("a device does not take Pong"))]


def test_a_reply_in_half_precision_is_asked_for_by_the_request(service: DeviceService) -> None:
    message = request(service, (2,), [[0, 1, 2]], [1.0, 1.0, 1.0])
    assert isinstance(message.header, ExpertRequest) and message.rows is not None
    half = Message(msgspec.structs.replace(message.header, wire="fp16"), message.rows.astype("<f2"))
    _, job = service.on_message(half)
    assert job is not None
    reply = job.run()
    assert isinstance(reply.header, ExpertReply) and reply.header.wire == "fp16"
    assert reply.rows is not None and reply.rows.dtype == np.float16


def test_what_an_error_quotes_is_cut(service: DeviceService) -> None:
    (answer,) = service.on_malformed(ProtocolError("x" * 100_000))
    assert isinstance(answer.header, ErrorReport) and len(answer.header.text) == 1000
