"""Devices that fail while others can take their place: the answer is the same, or what is missing is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import inprocess
import msgspec
import numpy as np
import pytest
from inprocess import System, open_system, run_sequence

from wdmoe.bs.dispatch import combine
from wdmoe.bs.fleet import PROBE_LAST_S, Health
from wdmoe.bs.microbatch import pack_sequence
from wdmoe.bs.policies import Exact, Wlr
from wdmoe.bs.records import Record
from wdmoe.bs.requests import LATE_AT_MOST_S
from wdmoe.bs.routing import Floats
from wdmoe.bs.stages import new_cache
from wdmoe.profiles.device_profile import Point
from wdmoe.runtime.errors import BundleError, DeviceFailed, DevicesMissing, DeviceTimeout
from wdmoe.runtime.messages import ErrorReport, ExpertReply, Goodbye, Message, encode

PROMPT = list(b"How does one keep bread fresh?")
KEEP_ALL = Wlr(alpha=0.0, gamma=1.0, step=1.0)
Edit = Callable[[Message], Message | None]


def break_device(system: System, name: str, edit: Edit, after: int = 0) -> None:
    """Let a device answer `after` requests well, and then what `edit` makes of its messages."""
    handler = system.link.peers[name.encode()]
    answered = [0]

    def maybe(message: Message) -> Message | None:
        answered[0] += isinstance(message.header, ExpertReply)
        return message if answered[0] <= after else edit(message)

    system.link.peers[name.encode()] = inprocess.edited(handler, system.manifest.model.d_model, maybe)


def vanished(message: Message) -> None:
    return None


def not_finite(message: Message) -> Message:
    if not isinstance(message.header, ExpertReply) or message.rows is None:
        return message
    return Message(message.header, np.full_like(message.rows, np.nan))


def complaining(message: Message) -> Message:
    if not isinstance(message.header, ExpertReply):
        return message
    return Message(ErrorReport("out of memory", message.header.request_id))


def leaving(message: Message) -> Message:
    return Message(Goodbye("power off")) if isinstance(message.header, ExpertReply) else message


FAILURES = [vanished, not_finite, complaining, leaving]
failures = pytest.mark.parametrize("edit", FAILURES, ids=lambda edit: edit.__name__)


@failures
@pytest.mark.parametrize("after", [0, 1])
def test_a_replica_takes_over_and_the_answer_is_the_same(bundle: Path, edit: Edit, after: int) -> None:
    with open_system(bundle, replicas=[3]) as system:
        expected = run_sequence(system, PROMPT)
        break_device(system, "device-3", edit, after)
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        assert system.pipeline.requests.fleet.of("device-3").health is not Health.HEALTHY
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)


@failures
def test_the_base_stations_own_copy_takes_over(bundle: Path, edit: Edit) -> None:
    with open_system(bundle, holds=1) as system:
        expected = run_sequence(system, PROMPT)
        break_device(system, "device-3", edit, after=1)
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)


def test_all_devices_may_fail_if_the_base_station_holds_everything(bundle: Path) -> None:
    with open_system(bundle, holds=16) as system:
        expected = run_sequence(system, PROMPT)
        for k in range(4):
            break_device(system, f"device-{k}", vanished)
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)


def test_the_replica_may_fail_too_and_then_the_run_ends_with_a_name(bundle: Path) -> None:
    with open_system(bundle, replicas=[3]) as system:
        break_device(system, "device-3", not_finite)
        break_device(system, "replica-3", not_finite)
        with pytest.raises(DeviceFailed, match="-3: sent rows that are not finite"):
            run_sequence(system, PROMPT)


def test_a_blocked_device_without_a_replacement_is_named_with_its_reason(bundle: Path) -> None:
    with open_system(bundle) as system:
        break_device(system, "device-3", not_finite)
        with pytest.raises(DeviceFailed):
            run_sequence(system, PROMPT)
        with pytest.raises(DeviceFailed, match=r"device-3: sent rows that are not finite .*; nobody else holds"):
            run_sequence(system, PROMPT)


def test_a_slow_device_is_hedged_before_it_is_lost(bundle: Path) -> None:
    with open_system(bundle, replicas=[1]) as system:
        expected = run_sequence(system, PROMPT)
        handler = system.link.peers[b"device-1"]
        held: list[Message] = []

        def stuck(message: Message) -> Message | None:
            if isinstance(message.header, ExpertReply):
                held.append(message)
                return None
            return message  # pings are answered: it is not lost

        system.link.peers[b"device-1"] = inprocess.edited(handler, system.manifest.model.d_model, stuck)
        before_s = system.clock.now_s()
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        requests = system.pipeline.requests
        assert requests.counts["hedged"] >= 1 and requests.counts["replaced"] == 0
        assert system.clock.now_s() - before_s < 2.0  # sooner than any device is given up
        assert requests.fleet.of("device-1").health is Health.PENALISED
        system.link.deliver(b"device-1", encode(held[0]))  # what comes late changes nothing
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)


def test_a_blocked_device_works_again_after_a_probe(bundle: Path) -> None:
    with open_system(bundle, replicas=[3]) as system:
        sound = system.link.peers[b"device-3"]
        break_device(system, "device-3", not_finite)
        run_sequence(system, PROMPT)
        fleet = system.pipeline.requests.fleet
        assert fleet.of("device-3").health is Health.BLOCKED
        system.clock.advance(5.0)
        run_sequence(system, PROMPT)  # the probe is answered with nonsense as well
        assert fleet.of("device-3").health is Health.BLOCKED
        system.link.peers[b"device-3"] = sound
        system.clock.advance(10.0)
        run_sequence(system, PROMPT)
        run_sequence(system, PROMPT)
        assert fleet.of("device-3").health is Health.PENALISED
        assert "probe answered after: sent rows" in fleet.of("device-3").reason
        break_device(system, "replica-3", vanished)
        for _ in range(15):
            run_sequence(system, PROMPT)
        assert fleet.of("device-3").health is Health.HEALTHY


def test_a_device_that_froze_often_is_probed_as_soon_as_it_is_heard_again(bundle: Path) -> None:
    with open_system(bundle, replicas=[3]) as system:
        sound = system.link.peers[b"device-3"]
        fleet = system.pipeline.requests.fleet
        for _ in range(8):
            fleet.block("device-3", "froze", system.clock.now_s())
        fleet.on_probe_answered("device-3")
        fleet.penalise("replica-3", "so that the other is asked")
        break_device(system, "device-3", vanished)
        run_sequence(system, PROMPT)
        for _ in range(60):
            system.pipeline.idle(0.1)
        assert fleet.of("device-3").probe_pause_s == PROBE_LAST_S and not fleet.usable("device-3")
        system.link.peers[b"device-3"] = sound
        for _ in range(30):
            system.pipeline.idle(0.1)
        assert fleet.usable("device-3")  # after three seconds of the sixty


def test_a_device_that_comes_back_is_used_again(bundle: Path) -> None:
    with open_system(bundle, holds=8) as system:
        expected = run_sequence(system, PROMPT)
        handler = system.link.peers.pop(b"device-0")
        system.link.deliver(b"device-0", encode(Message(Goodbye("restart"))))
        np.testing.assert_allclose(run_sequence(system, PROMPT), expected, atol=1e-5)
        hello = msgspec.structs.replace(system.services["device-0"]._hello(), session="second-start")
        system.link.peers[b"again"] = handler
        system.link.deliver(b"again", encode(Message(hello)))
        answered = system.services["device-0"].requests
        run_sequence(system, PROMPT)
        np.testing.assert_array_equal(run_sequence(system, PROMPT), expected)
        assert system.services["device-0"].requests > answered


def test_who_left_is_named_though_several_left_at_once(bundle: Path) -> None:
    with open_system(bundle) as system:
        run_sequence(system, PROMPT)
        break_device(system, "device-1", leaving)
        break_device(system, "device-2", leaving)
        with pytest.raises(DeviceFailed, match=r"device-1: left \(power off\) before it answered"):
            run_sequence(system, PROMPT)
        with pytest.raises(DevicesMissing, match=r"by no connected device; gone: device-1, device-2$"):
            run_sequence(system, PROMPT)


def test_exact_never_skips(bundle: Path) -> None:
    with open_system(bundle, skip_lost=True) as system:
        break_device(system, "device-3", vanished)
        with pytest.raises(DeviceTimeout, match="device-3"):
            run_sequence(system, PROMPT)


def test_another_policy_may_skip_what_is_lost_and_counts_it(bundle: Path) -> None:
    with open_system(bundle, skip_lost=True) as system:
        expected = run_sequence(system, PROMPT, KEEP_ALL)
        break_device(system, "device-3", complaining)
        cache = new_cache(system.manifest, len(PROMPT))
        microbatch = pack_sequence("prompt", PROMPT, cache, None, all_logits=True)
        ((_, result, record),) = system.pipeline.run([microbatch], KEEP_ALL)
        assert result.logits is not None and np.isfinite(result.logits).all()
        assert np.abs(result.logits - expected).max() > 1e-3
        assert record.blocks[0].skipped > 0 and record.blocks[0].gate_mass_dropped > 0
        assert system.pipeline.requests.counts["skipped"] == 2  # once in each block


@pytest.mark.parametrize("k", range(4))
def test_what_is_skipped_counts_once_though_a_second_device_fails_too(bundle: Path, k: int) -> None:
    """A device and then its half replica fail: what was skipped at first is skipped again the second time round."""

    def skip(replicas: Sequence[int], *broken: str) -> tuple[Floats, Record]:
        with open_system(bundle, skip_lost=True, replicas=replicas) as system:
            if replicas:
                half = system.hub.devices[f"replica-{k}"]
                half.experts = frozenset((block, expert) for block, expert in half.experts if expert == 2 * k)
            for name in broken:
                break_device(system, name, complaining)
            cache = new_cache(system.manifest, len(PROMPT))
            microbatch = pack_sequence("prompt", PROMPT, cache, None, all_logits=True)
            ((_, result, record),) = system.pipeline.run([microbatch], KEEP_ALL)
            assert result.logits is not None
            return result.logits, record

    _, once = skip([], f"device-{k}")
    _, twice = skip([k], f"device-{k}", f"replica-{k}")
    first, second = once.blocks[0], twice.blocks[0]
    assert first.skipped == second.skipped > 0
    assert first.gate_mass_dropped == pytest.approx(second.gate_mass_dropped)


@pytest.mark.parametrize("call_ms", [1e9, float("inf")])
def test_no_profile_can_make_the_base_station_wait_for_ever(bundle: Path, call_ms: float) -> None:
    with open_system(bundle) as system:
        run_sequence(system, PROMPT)
        tracker = system.hub.devices["device-3"].latency
        points = (Point(1, call_ms, call_ms), Point(64, call_ms, 1e3 * call_ms))
        tracker.profile = msgspec.structs.replace(tracker.profile, points=points)
        tracker._model = None
        break_device(system, "device-3", vanished)
        before_s = system.clock.now_s()
        with pytest.raises(DeviceTimeout, match="device-3: no answer"):
            run_sequence(system, PROMPT)
        assert system.clock.now_s() - before_s <= LATE_AT_MOST_S + 2.0


def test_one_call_that_was_preempted_does_not_stretch_the_deadlines(bundle: Path) -> None:
    with open_system(bundle) as system:
        tracker = system.hub.devices["device-3"].latency
        tracker.profile = msgspec.structs.replace(tracker.profile, points=(Point(1, 10.0, 10_000.0),))
        tracker.ratios.clear()
        tracker._model = None
        break_device(system, "device-3", vanished)
        before_s = system.clock.now_s()
        with pytest.raises(DeviceTimeout, match="device-3: no answer"):
            run_sequence(system, PROMPT)
        assert system.clock.now_s() - before_s < 50.0


def test_what_is_skipped_is_made_up_for_by_scaling_the_rest() -> None:
    ones = np.ones((3, 2), np.float32)
    partials = [(np.array([0, 1, 2]), 0.6 * ones)]
    total = combine(3, 2, partials, np.array([0.4, 0.0, 1.0], np.float32), shared=np.full((3, 2), 5, np.float32))
    expected = np.array([[6, 6], [5.6, 5.6], [5, 5]], np.float32)
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_held_experts_are_checked_when_they_are_loaded(bundle: Path, tmp_path: Path) -> None:
    for name in ("bs", "experts"):
        shutil.copytree(bundle / name, tmp_path / name)
    for path in (tmp_path / "experts").glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    for k in range(4):
        shutil.copytree(bundle / f"device-{k}", tmp_path / f"device-{k}")
    with open_system(tmp_path, holds=4) as system:
        break_device(system, "device-1", complaining)
        with pytest.raises(BundleError, match="its name says otherwise"):
            run_sequence(system, PROMPT)
    shutil.rmtree(tmp_path / "experts")
    with pytest.raises(BundleError, match="needs the folder `experts`"), open_system(tmp_path, holds=4):
        pass


def test_no_answer_is_lost_whoever_fails_and_whenever(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    with open_system(bundle, replicas=[0, 1, 2, 3]) as system:
        expected = run_sequence(system, PROMPT)
    for _ in range(24):
        with open_system(bundle, replicas=[0, 1, 2, 3]) as system:
            victim = f"{rng.choice(['device', 'replica'])}-{rng.integers(4)}"
            break_device(system, victim, FAILURES[rng.integers(len(FAILURES))], after=int(rng.integers(3)))
            for _ in range(2):
                np.testing.assert_allclose(run_sequence(system, PROMPT, Exact()), expected, atol=1e-5)
