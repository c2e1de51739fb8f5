"""The command: one line for every failure, results on stdout, and nothing imported that `--help` does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tiny import tiny_checkpoint

from wdmoe.export.cli import main
from wdmoe.export.cli_common import plain_errors, progress_lines
from wdmoe.runtime.manifest import BsManifest, read_manifest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-mixtral", "mixtral")


def _run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_an_export_says_what_it_made(checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = _run("--model", checkpoint, "--experts-per-device", 3, "--out", tmp_path / "bundle")
    assert code == 0
    assert "tiny-mixtral (mixtral)" in out
    assert "experts 6, 7 of every block" in out
    code, out, _ = _run("--model", checkpoint, "--experts-per-device", 3, "--out", tmp_path / "bundle")
    assert code == 0
    assert "already there" in out


def test_results_for_programs_are_json(checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = _run("--model", checkpoint, "--devices", 2, "--out", tmp_path / "bundle", "--json")
    made = json.loads(out)
    assert (code, made["already_there"], len(made["devices"])) == (0, False, 2)
    code, out, _ = _run("inspect", tmp_path / "bundle", "--json")
    assert (code, json.loads(out)["bundle_id"]) == (0, made["bundle_id"])


def test_inspect_names_a_damaged_file(checkpoint: Path, tmp_path: Path) -> None:
    _run("--model", checkpoint, "--out", tmp_path / "bundle")
    assert _run("inspect", tmp_path / "bundle")[0] == 0
    (tmp_path / "bundle/bs/head.onnx").write_bytes(b"")
    code, _, err = _run("inspect", tmp_path / "bundle")
    assert code == 1
    assert "head.onnx: size is 0 bytes" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing option '--model'"),
        (["--model", "CHECKPOINT", "--devices", "2", "--experts-per-device", "2"], 2, "not both"),
        (["--model", "CHECKPOINT", "--devices", "9"], 2, "1 to 8"),
        (["--model", "CHECKPOINT", "--experts-per-device", "9"], 2, "1 to 8"),
        (["--model", "CHECKPOINT", "--experts-per-device", "0"], 2, "experts-per-device"),
        (["--model", "CHECKPOINT", "inspect", "."], 2, "--model does not go before the command inspect"),
        (["--out", "q", "--precision", "int4", "inspect", "."], 2, "--out does not go before the command inspect"),
        (["--json", "inspect", "."], 2, "--json does not go before the command inspect"),
        (["--model", "no-such-model"], 1, "no such folder"),
        (["--model", "./no/such"], 1, "no such folder"),
        (["--model", "CHECKPOINT", "--device-memory", "16 lorries"], 2, "is not a size"),
        (["--model", "CHECKPOINT", "--placement", "balanced", "--speeds", "1,fast"], 2, "neither a list of numbers"),
        (["--model", "CHECKPOINT", "--speeds", "1,2"], 2, "are for a balanced placement"),
        (["--model", "CHECKPOINT", "--placement", "no-such.json"], 1, "no-such.json: No such file"),
        (["--model", "nobody/nothing", "--dry-run"], 1, "a plan needs its config.json"),
        (["inspect", "no-such-folder"], 2, "does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    filled = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    options = [] if "inspect" in filled else ["--out", str(tmp_path / "bundle")]
    found, _, err = _run(*options, *filled)
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "bundle").exists()


def test_ctrl_c_says_that_the_export_can_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, plain_errors("goes on"):
        raise KeyboardInterrupt
    assert (exit_.value.code, capsys.readouterr().err) == (130, "goes on\n")


def test_a_full_disk_is_told_in_one_line() -> None:
    with pytest.raises(click.ClickException, match="x: No space left on device"), plain_errors(""):
        raise OSError(28, "No space left on device", "x")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, wdmoe.export.cli; print({'numpy', 'onnx', 'torch', 'transformers', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_an_export_imports_no_torch(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from wdmoe.export.cli import main\n"
        f"main(['--model', {str(checkpoint)!r}, '--out', {str(tmp_path / 'b')!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("alias", "repository"),
    [
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1"),
        ("mixtral-8x22b", "mistralai/Mixtral-8x22B-v0.1"),
        ("olmoe", "allenai/OLMoE-1B-7B-0924"),
        ("qwen2-moe", "Qwen/Qwen1.5-MoE-A2.7B"),
        ("qwen3-moe", "Qwen/Qwen3-30B-A3B"),
        ("granite-moe", "ibm-granite/granite-3.0-1b-a400m-base"),
    ],
)
def test_an_alias_that_cannot_be_downloaded_names_the_folder_to_give(
    tmp_path: Path, alias: str, repository: str
) -> None:
    command = [sys.executable, "-c", "from wdmoe.export.cli import main; main()", "--model", alias]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=offline, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert repository in done.stderr
    assert "--model FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_needs_neither_weights_nor_a_network_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = ["--model", "mixtral", "--experts-per-device", 2, "--dry-run", "--device-memory", "32GB", "--out", out]
    code, text, _ = _run(*arguments)
    assert code == 0
    assert "46.70 billion parameters" in text
    assert "device-3" in text
    assert " ".join(text.split()).endswith("fp16 on devices of 32.00 GB, 20% of it kept free: fits.")
    code, text, _ = _run(*arguments, "--json")
    plan = json.loads(text)
    assert (code, plan["parameters"], plan["fits"], len(plan["devices"]["fp16"])) == (0, 46_702_792_704, True, 4)
    assert [device["fits"] for device in plan["devices"]["fp32"]] == [False] * 4
    assert not list(tmp_path.iterdir())


def test_a_balanced_placement_is_shown_before_the_export(checkpoint: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps([[9, 1, 1, 1, 1, 1, 1, 1]] * 2))
    options = ["--placement", "balanced", "--counts", counts, "--speeds", "1,1", "--replicas", 1]
    code, out, err = _run("--model", checkpoint, *options, "--out", tmp_path / "bundle", "--json")
    assert code == 0
    assert "Slowest device of each block: 1.12" in " ".join(err.split())
    held = [[expert for _, expert in device["experts"]] for device in json.loads(out)["devices"]]
    assert held == [[0, 0], [0, 1, 2, 3, 4, 5, 6, 7] * 2]


def test_place_makes_another_placement_of_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    _run("--model", checkpoint, "--out", tmp_path / "bundle")
    code, out, _ = _run("place", tmp_path / "bundle", "--devices", 2, "--out", tmp_path / "two")
    assert code == 0
    assert "experts 4, 5, 6, 7 of every block" in out
    assert _run("inspect", tmp_path / "two")[0] == 0
    code, _, err = _run("place", tmp_path / "bundle", "--devices", 2, "--out", tmp_path / "two")
    assert (code, "already there" in err) == (1, True)
    code, out, _ = _run("place", tmp_path / "two", "--replicas", 8, "--out", tmp_path / "mirrored", "--json")
    assert [len(device["experts"]) for device in json.loads(out)["devices"]] == [16, 16]
    code, _, err = _run("place", tmp_path / "bundle", "--devices", 9, "--out", tmp_path / "nine")
    assert (code, "1 to 8" in err) == (2, True)


def test_off_a_terminal_a_line_now_and_then_says_how_far_it_is() -> None:
    times = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    said: list[str] = []
    advance = progress_lines("exporting", 8 * 10**9, "bytes", said.append, lambda: next(times))
    for _ in range(4):
        advance(10**9)
    assert said == ["exporting: 2.00 of 8.00 GB, 65 MB/s, 93 s left", "exporting: 4.00 of 8.00 GB, 65 MB/s, 62 s left"]


def test_hashes_are_shown_whole_at_80_columns(checkpoint: Path, tmp_path: Path) -> None:
    _run("--model", checkpoint, "--out", tmp_path / "bundle")
    code, out, _ = _run("inspect", tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle/bs", BsManifest)
    assert code == 0 and "…" not in out
    assert manifest.bundle_id in "".join(out.split()) and manifest.source.checkpoint_sha256 in "".join(out.split())


def test_place_says_what_it_does_where_nothing_is_said() -> None:
    text = " ".join(_run("place", "--help")[1].split())
    assert "[default: (as BUNDLE has them)" in text
    assert "[default: (2)" in " ".join(_run("--help")[1].split())


def test_unequal_devices_are_given_by_name_with_memory_and_speed_of_each() -> None:
    names = "agx-orin-64gb,orin-nx-16gb,orin-nx-16gb"
    arguments = ["--model", "mixtral", "--precision", "int8", "--dry-run", "--json", "--device-memory", names]
    code, out, _ = _run(*arguments, "--placement", "balanced", "--speeds", names)
    plan = json.loads(out)
    held = [device["experts"] for device in plan["devices"]["int8"]]
    assert (code, plan["fits"], sum(held)) == (0, True, 256)
    assert held[0] > 1.8 * held[1] and plan["device_memory_bytes"] == [64 * 10**9, 16 * 10**9, 16 * 10**9]
    code, out, _ = _run(*arguments, "--placement", "balanced")
    assert (code, len(json.loads(out)["devices"]["int8"])) == (0, 3)  # as many devices as sizes of memory
    assert "3 sizes of memory for 4 devices" in _run(*arguments, "--devices", 4)[2]
    plan = json.loads(_run(*arguments, "--devices", 3)[1])
    assert (plan["fits"], plan["advice"]) == (False, "use --placement balanced, which heeds the memory of each")


def test_the_manifest_keeps_what_a_placement_was_balanced_by(checkpoint: Path, tmp_path: Path) -> None:
    counts = [[9, 1, 1, 1, 1, 1, 1, 1]] * 2
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    options = ["--placement", "balanced", "--counts", tmp_path / "counts.json", "--speeds", "3,1"]
    assert _run("--model", checkpoint, *options, "--out", tmp_path / "bundle")[0] == 0
    code, out, _ = _run("inspect", tmp_path / "bundle", "--json")
    kept = json.loads(out)["balance"]
    assert (code, kept["counts"], kept["speeds"]) == (0, counts, [3.0, 1.0])
    assert kept["times"] == [[pytest.approx(1.0), pytest.approx(1.0)]] * 2
    assert "slowest device of each block 1.00" in _run("inspect", tmp_path / "bundle")[1]
    # Replicas keep what it was balanced by, another placement does not.
    assert _run("place", tmp_path / "bundle", "--replicas", 8, "--out", tmp_path / "twice")[0] == 0
    assert json.loads(_run("inspect", tmp_path / "twice", "--json")[1])["balance"]["speeds"] == [3.0, 1.0]
    assert _run("place", tmp_path / "bundle", "--devices", 2, "--out", tmp_path / "even")[0] == 0
    assert json.loads(_run("inspect", tmp_path / "even", "--json")[1])["balance"] is None
    assert b"balance" not in (tmp_path / "even/bs/manifest.json").read_bytes()
