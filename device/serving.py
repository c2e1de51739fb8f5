"""The serving loop of a device: exchange, answer, compute; until told to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from wdmoe.device.outlet import Outlet
from wdmoe.device.service import HELLO_EVERY_S, DeviceService
from wdmoe.runtime.emulation import Air
from wdmoe.runtime.errors import ProtocolError, WdmoeError
from wdmoe.runtime.links import BS, Link, Parcel
from wdmoe.runtime.messages import ExpertRequest, Goodbye, Message, decode, encode
from wdmoe.runtime.stopping import StopFlag
from wdmoe.runtime.worker import Worker

_HINT_AFTER_S = 15.0
_REDIAL_AFTER_S = 10.0  # without a welcome
_SHORT_MS = 20.0  # a ping can wait that long; handing a job to the worker and back costs two switches of thread
_GOODBYE_WAIT_S = 0.5


def serve(
    service: DeviceService,
    link: Link,
    worker: Worker[Message],
    stop: StopFlag,
    say: Callable[[str], None],
    air: Air | None = None,
) -> None:
    """Serve until `stop` is set, then say goodbye.

    Args:
        service: what to answer.
        link: to the base station.
        worker: runs what takes long, so that pings are answered meanwhile.
        stop: set by a signal handler, which also wakes the link.
        say: told when the base station comes and goes.
        air: holds what an emulated device says; None: this device is what it is, and answers at once.

    Raises:
        WdmoeError: the base station refused this device for good; the text is the base station's.
    """
    outgoing: list[Message] = []
    inbox: deque[Parcel] = deque()
    outlet = Outlet()
    with_worker = 0  # jobs
    was_welcome = False
    hint_s = service.clock.now_s() + _HINT_AFTER_S
    redial_s = service.clock.now_s() + _REDIAL_AFTER_S
    notice: str | None = None
    while not stop.is_set():
        if service.clock.now_s() > hint_s:
            hint_s = float("inf")
            say(
                f"{service.name}: no answer from the base station yet; is it running there? "
                "An encrypted one hears only devices that are enrolled, one that is not hears only --insecure ones"
            )
        if service.welcomed:
            redial_s = service.clock.now_s() + _REDIAL_AFTER_S
        elif service.clock.now_s() > redial_s:
            redial_s = service.clock.now_s() + _REDIAL_AFTER_S
            link.redial()
        outgoing += service.on_tick()
        now_s = service.clock.now_s()
        wait_s = 0.0 if inbox else HELLO_EVERY_S
        if air is not None:
            outgoing += (message for answer in air.due(now_s) for message in outlet.release(answer, now_s))
            wait_s = air.wait_s(now_s, wait_s)
        outgoing += outlet.due(now_s)
        wait_s = outlet.wait_s(now_s, wait_s)
        inbox += link.exchange([Parcel(BS, encode(message)) for message in outgoing], wait_s)
        arrived_s = service.clock.now_s()
        outgoing = []
        while inbox:
            frames = inbox.popleft().frames
            try:
                message = decode(frames, service.manifest.model.d_model)
            except ProtocolError as error:
                outgoing += service.on_malformed(error)
                continue
            answers, job = service.on_message(message)
            outgoing += answers if air is None else air.hold(answers, arrived_s)
            if job is not None:
                assert isinstance(message.header, ExpertRequest)
                outlet.note(message.header)
            # While this thread computes, nothing that is held can leave in time.
            holds = air is not None or outlet.holding
            if job is not None and (with_worker or job.expected_ms > _SHORT_MS or holds):
                if air is not None:
                    assert isinstance(message.header, ExpertRequest)
                    air.start(message.header, frames, arrived_s)
                worker.submit(job.run)
                with_worker += 1
            elif job is not None:
                outgoing += outlet.release(job.run(), service.clock.now_s())
                break  # this answer does not wait for the next to be computed
        for done in worker.finished():
            assert done.result is not None, done.error
            with_worker -= 1
            if air is None:
                outgoing += outlet.release(done.result, service.clock.now_s())
            else:
                air.finish(done.result, service.clock.now_s())
        if service.notice != notice:
            notice = service.notice
            if notice is not None:
                say(f"{service.name}: the base station says: {notice}")
        if service.refused is not None:
            raise WdmoeError(f"the base station refused {service.name}: {service.refused}")
        if service.welcomed != was_welcome:
            was_welcome = service.welcomed
            hint_s = float("inf")
            if not was_welcome:
                outlet = Outlet()  # what is held is for a base station that is gone
            say(f"{service.name}: " + ("serving" if was_welcome else "base station gone, waiting for it"))
    _say_goodbye(service, link)


def _say_goodbye(service: DeviceService, link: Link) -> None:
    """Tell the base station, and wait a moment until it has heard.

    A socket that closes with something unread resets the connection, and the goodbye is lost with it.
    """
    goodbye = Parcel(BS, encode(Message(Goodbye("stopped by its operator"))))
    deadline_s = service.clock.now_s() + (_GOODBYE_WAIT_S if service.welcomed else 0.0)
    arrived = link.exchange([goodbye], 0.0)
    while not any(_is_goodbye(parcel, service.manifest.model.d_model) for parcel in arrived):
        if (left_s := deadline_s - service.clock.now_s()) <= 0:
            return
        arrived = link.exchange([], left_s)


def _is_goodbye(parcel: Parcel, d_model: int) -> bool:
    try:
        return isinstance(decode(parcel.frames, d_model).header, Goodbye)
    except ProtocolError:
        return False
