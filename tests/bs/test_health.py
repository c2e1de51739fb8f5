from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from click.testing import CliRunner
from inprocess import System, open_system, run_sequence

from wdmoe.bs.cli import main
from wdmoe.bs.health import serve_health, snapshot
from wdmoe.runtime.errors import WdmoeError
from wdmoe.runtime.messages import Goodbye, Message, encode

PROMPT = list(b"How does one keep bread fresh?")


def told(system: System) -> dict[str, Any]:
    return snapshot(system.hub, system.pipeline, system.manifest)


def test_a_healthy_system_is_ok(bundle: Path) -> None:
    with open_system(bundle) as system:
        run_sequence(system, PROMPT)
        answer = told(system)
        assert answer["status"] == "ok" and answer["gone"] == [] and answer["experts_without_device"] == 0
        assert [device["name"] for device in answer["devices"]] == [f"device-{k}" for k in range(4)]


def test_a_device_that_is_gone_degrades_what_a_replica_keeps_up(bundle: Path) -> None:
    with open_system(bundle, replicas=[3]) as system:
        run_sequence(system, PROMPT)
        system.link.deliver(b"device-3", encode(Message(Goodbye("moved"))))
        run_sequence(system, PROMPT)
        answer = told(system)
        assert answer["status"] == "degraded" and answer["gone"] == ["device-3"] and not answer["experts_unserved"]


def test_experts_that_nobody_can_run_are_failing(bundle: Path) -> None:
    with open_system(bundle) as system:
        system.link.peers[b"device-0"] = lambda frames: []
        with pytest.raises(WdmoeError):
            run_sequence(system, PROMPT)
        answer = told(system)
        assert answer["status"] == "failing"
        assert answer["devices"][0]["state"] == "blocked" and "silent for" in answer["devices"][0]["reason"]


def test_a_loop_that_does_not_turn_while_work_is_in_flight_is_stalled(bundle: Path) -> None:
    seen: list[str] = []
    with open_system(bundle) as system:
        handler = system.link.peers[b"device-0"]

        def hang(frames):  # type: ignore[no-untyped-def]
            system.clock.advance(30.0)
            seen.append(told(system)["status"])
            return handler(frames)

        system.link.peers[b"device-0"] = hang
        with contextlib.suppress(WdmoeError):  # whether the others count as lost does not matter here
            run_sequence(system, PROMPT)
    assert "stalled" in seen


@pytest.mark.parametrize(("status", "code"), [("ok", 200), ("degraded", 200), ("failing", 503), ("stalled", 503)])
def test_the_answer_is_served_with_a_status_that_monitors_understand(status: str, code: int) -> None:
    with serve_health("127.0.0.1:0", lambda: {"status": status}) as url:
        try:
            with urlopen(url, timeout=5) as reply:
                assert (reply.status, json.load(reply)) == (code, {"status": status})
        except HTTPError as error:
            with error:
                assert (error.code, json.load(error)) == (code, {"status": status})
        with pytest.raises(HTTPError, match="404") as caught:
            urlopen(url.replace("/health", "/secrets"), timeout=5)
        caught.value.close()


def test_an_address_in_use_is_refused() -> None:
    with serve_health("127.0.0.1:0", dict) as url:
        address = url.removeprefix("http://").removesuffix("/health")
        with pytest.raises(WdmoeError, match="give another --health"), serve_health(address, dict):
            pass
    with pytest.raises(ValueError, match="expected HOST:PORT"), serve_health("5556", dict):
        pass


def ask(url: str, *options: str) -> Any:
    address = url.removeprefix("http://").removesuffix("/health")
    return CliRunner().invoke(main, ["status", "--health", address, *options])


def test_the_command_shows_what_is_served(bundle: Path) -> None:
    with open_system(bundle) as system:
        run_sequence(system, PROMPT)
        describe: Callable[[], dict[str, Any]] = lambda: told(system)
        with serve_health("127.0.0.1:0", describe) as url:
            shown = ask(url)
            assert shown.exit_code == 0 and "qwen2_moe: ok" in shown.output and "device-3" in shown.output
            assert json.loads(ask(url, "--json").stdout)["status"] == "ok"
            system.link.peers[b"device-1"] = lambda frames: []
            with pytest.raises(WdmoeError):
                run_sequence(system, PROMPT)
            broken = ask(url)
            assert broken.exit_code == 1 and "failing" in broken.output and "blocked" in broken.output
    gone = ask(url)
    assert gone.exit_code == 1 and "no answer" in gone.output
