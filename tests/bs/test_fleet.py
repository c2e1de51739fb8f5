from __future__ import annotations

from wdmoe.bs.fleet import GOOD_ANSWERS, MAX_GONE, PROBE_LAST_S, SLOW_CORRECTION, Fleet, Health


def test_a_new_device_is_healthy() -> None:
    assert Fleet().usable("a") and Fleet().of("a").health is Health.HEALTHY


def test_penalised_devices_come_after_healthy_ones_and_blocked_ones_never() -> None:
    fleet = Fleet()
    assert fleet.preferred(["b", "a"]) == "a"
    fleet.penalise("a", "slow")
    assert fleet.preferred(["b", "a"]) == "b"
    fleet.block("b", "lost", 0.0)
    assert fleet.preferred(["b", "a"]) == "a"
    fleet.block("a", "lost", 0.0)
    assert fleet.preferred(["b", "a"]) is None and fleet.preferred([]) is None


def test_good_answers_in_a_row_lift_a_penalty_and_a_slow_one_starts_the_count_again() -> None:
    fleet = Fleet()
    fleet.penalise("a", "hedged")
    for _ in range(GOOD_ANSWERS - 1):
        fleet.on_good_answer("a", 1.0)
    fleet.on_good_answer("a", 9.0)
    assert "9.0 x slower than its profile" in fleet.of("a").reason
    for _ in range(GOOD_ANSWERS):
        assert fleet.of("a").health is Health.PENALISED
        fleet.on_good_answer("a", 1.0)
    assert fleet.of("a").health is Health.HEALTHY


def test_a_penalty_does_not_unblock() -> None:
    fleet = Fleet()
    fleet.block("a", "lost", 0.0)
    fleet.penalise("a", "slow")
    assert not fleet.usable("a")


def test_probes_pause_longer_each_time_up_to_a_limit() -> None:
    fleet = Fleet()
    fleet.block("a", "lost", 0.0)
    now_s = 0.0
    pauses: list[float] = []
    last_s = 0.0
    while len(pauses) < 9:
        now_s += 0.5
        if fleet.probes_due(["a"], now_s):
            pauses.append(now_s - last_s)
            last_s = now_s
    assert pauses == sorted(pauses) and pauses[0] == 1.0 and pauses[-1] == PROBE_LAST_S


def test_who_was_blocked_for_silence_and_is_heard_again_is_probed_at_once() -> None:
    fleet = Fleet()
    for _ in range(10):  # so that the pause is long
        fleet.block("silent", "silent for 2.0 s", 100.0, silent_since_s=98.0)
        fleet.block("wrong", "not finite", 100.0)
    fleet.on_heard("silent", 98.0, 103.0)  # nothing new
    assert fleet.probes_due(["silent", "wrong"], 103.0) == []
    for device in ("silent", "wrong"):
        fleet.on_heard(device, 103.5, 104.0)
    assert fleet.probes_due(["silent", "wrong"], 104.0) == ["silent"]
    fleet.on_heard("silent", 104.5, 105.0)  # once: if it does not answer, it has to wait again
    assert fleet.probes_due(["silent", "wrong"], 105.0) == []


def test_only_connected_devices_are_probed() -> None:
    fleet = Fleet()
    fleet.block("a", "lost", 0.0)
    assert fleet.probes_due([], 100.0) == []
    assert fleet.probes_due(["a", "b"], 100.0) == ["a"]


def test_a_probe_or_a_hello_lets_a_blocked_device_work_under_watch() -> None:
    fleet = Fleet()
    fleet.block("a", "lost", 0.0)
    fleet.on_probe_answered("a")
    assert fleet.of("a").health is Health.PENALISED and "probe answered after: lost" in fleet.of("a").reason
    fleet.block("a", "lost again", 0.0)
    fleet.on_joined("a")
    assert fleet.of("a").health is Health.PENALISED and fleet.of("a").failures == 2
    fleet.on_joined("b")
    assert fleet.of("b").health is Health.HEALTHY


def test_what_is_remembered_does_not_grow_with_the_names_that_came_and_left() -> None:
    fleet = Fleet()
    for number in range(3 * MAX_GONE):
        name = f"passer-by-{number}"
        fleet.on_joined(name)
        assert fleet.usable(name)
        fleet.block(name, "lost", 0.0)
        fleet.on_left(name)
    assert len(fleet.standings) == MAX_GONE and list(fleet.gone) == list(fleet.standings)
    assert fleet.of(f"passer-by-{3 * MAX_GONE - 1}").reason == "lost" and fleet.usable("passer-by-0")


def test_who_comes_back_is_not_gone_and_is_remembered_again() -> None:
    fleet = Fleet()
    fleet.block("a", "lost", 0.0)
    fleet.on_left("a")
    assert list(fleet.gone) == ["a"]
    fleet.on_joined("a")
    assert list(fleet.gone) == [] and fleet.of("a").reason == "back after: lost"


def test_asking_about_a_device_remembers_nothing() -> None:
    fleet = Fleet()
    assert fleet.preferred(["a", "b"]) == "a" and fleet.standings == {}


def test_of_two_under_watch_the_one_that_answers_is_preferred() -> None:
    fleet = Fleet()
    fleet.penalise("a", "another device answered sooner")
    fleet.penalise("b", "slow")
    assert fleet.preferred(["b", "a"]) == "a"
    fleet.on_good_answer("b", 1.0)
    assert fleet.preferred(["b", "a"]) == "b"


def test_a_device_that_stays_slow_changes_nothing_that_preferred_looks_at() -> None:
    fleet = Fleet()
    fleet.on_good_answer("a", SLOW_CORRECTION)
    changes = fleet.changes
    fleet.on_good_answer("a", SLOW_CORRECTION)
    assert fleet.changes == changes
    fleet.on_good_answer("a", 1.0)  # its first good answer since
    fleet.on_good_answer("a", SLOW_CORRECTION)
    assert fleet.changes == changes + 2
