from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from wdmoe.bs.cli import main
from wdmoe.bs.config import StationConfig
from wdmoe.runtime.keys import decode_token, read_key
from wdmoe.runtime.links import is_loopback


def test_a_run_shows_accuracy_and_latency_of_each_policy(bundle: Path, address: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / "result.json"
    arguments = ["run", "--bundle", str(bundle), "--listen", address, "--dataset", "piqa-sample", "--limit", "6"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(path), "--wait", "20"])
    assert result.exit_code == 0, result.output
    assert "piqa-sample: 6 rows (bundled sample), 4 devices over loopback (fp16)" in result.stdout
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    report = json.loads(path.read_text())
    exact, wlr = report["results"]
    assert [exact["policy"], wlr["policy"]] == ["exact", "wlr"]
    for run in (exact, wlr):
        assert run["rows"] == 6 and run["questions"] == 6
        assert 0 < run["latency_p50_ms"] <= run["latency_p95_ms"]
        assert run["bytes_down"] > 0 and set(run["accuracy"]) == {"acc", "acc_norm"}
    assert exact["dropped_share"] == 0
    assert wlr["bytes_down"] <= exact["bytes_down"]
    assert [device["name"] for device in report["devices"]] == [f"device-{k}" for k in range(4)]


def test_devices_lists_who_is_connected(bundle: Path, address: str) -> None:
    listed = CliRunner().invoke(main, ["devices", "--bundle", str(bundle), "--listen", address, "--json"])
    assert listed.exit_code == 0, listed.output
    answer = json.loads(listed.stdout)
    assert answer["missing"] == [] and len(answer["devices"]) == 4
    assert all(device["round_trip_ms"] > 0 and device["origin"] == "measured" for device in answer["devices"])


def test_devices_that_do_not_come_are_named(bundle: Path) -> None:
    arguments = ["run", "--bundle", str(bundle), "--listen", "tcp://127.0.0.1:0", "--dataset", "piqa-sample"]
    result = CliRunner().invoke(main, [*arguments, "--wait", "0.3"])
    assert result.exit_code == 1
    assert "no device-0, device-1, device-2, device-3; connected: none" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--dataset", "piqa-sample", "--bundle", "nowhere"], 1, "holds no manifest.json"),
        (["run", "--dataset", "piqa-sample", "--policy", "fastest"], 2, "unknown policy 'fastest'"),
        (["devices", "--insecure", "--encrypt"], 2, "contradict each other"),
        (["run", "--dataset", "piqa-sample", "--wait", "0"], 2, "--wait is 0.0"),
        (["run", "--dataset", "piqa-sample", "--bs-holds", "some"], 2, "expected a number of experts, all, or none"),
        (["run", "--dataset", "riddles"], 2, "riddles"),
        (["run"], 2, "Missing option '--dataset'"),
        (["devices", "--listen", "5555"], 2, "expected tcp://ADDRESS:PORT"),
    ],
)
def test_a_users_mistake_gets_a_message_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code and words in result.output
    assert "Traceback" not in result.output


def test_a_damaged_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle / "bs", tmp_path / "bs")
    path = tmp_path / "bs" / "head.onnx"
    path.unlink()
    arguments = ["run", "--bundle", str(tmp_path), "--listen", "tcp://127.0.0.1:0", "--dataset", "piqa-sample"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "head.onnx: missing; copy the folder again" in result.output


@pytest.mark.parametrize("command", [[], ["run"], ["quality"], ["devices"]])
def test_help_shows_defaults_and_examples(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "wdmoe-bs run --dataset piqa" in result.output if not command else "[default: bundle/bs]" in result.output


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///tmp/x", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://127.evil.example:1", False),
    ],
)
def test_only_addresses_of_this_machine_count_as_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_what_the_network_can_reach_is_encrypted_unless_the_user_says_no() -> None:
    assert StationConfig(listen="tcp://0.0.0.0:5555").encrypted
    assert not StationConfig(listen="tcp://0.0.0.0:5555", insecure=True).encrypted
    assert not StationConfig().encrypted
    assert StationConfig(encrypt=True).encrypted


def test_an_encrypted_base_station_needs_its_key(bundle: Path, tmp_path: Path) -> None:
    arguments = ["devices", "--bundle", str(bundle), "--listen", "tcp://127.0.0.1:0", "--encrypt"]
    result = CliRunner().invoke(main, [*arguments, "--keys", str(tmp_path)])
    assert result.exit_code == 1 and "bs.key: no key there" in result.output and "wdmoe-bs keygen" in result.output


def test_keys_are_made_tokens_printed_and_names_revoked(tmp_path: Path) -> None:
    keys = ["--keys", str(tmp_path)]
    made = CliRunner().invoke(main, ["keygen", *keys])
    assert made.exit_code == 0 and read_key(tmp_path / "bs.key").public == made.stdout.strip()
    assert CliRunner().invoke(main, ["keygen", *keys]).exit_code == 1
    token = CliRunner().invoke(main, ["enrol", "attic", *keys])
    assert token.exit_code == 0 and decode_token(token.stdout).bs_public == made.stdout.strip()
    assert CliRunner().invoke(main, ["enrol", "../attic", *keys]).exit_code == 2
    nobody = CliRunner().invoke(main, ["devices", "--revoke", "cellar", *keys])
    assert nobody.exit_code == 2 and "no device cellar on the roster" in nobody.output
    assert CliRunner().invoke(main, ["devices", "--revoke", "attic", *keys]).exit_code == 0
