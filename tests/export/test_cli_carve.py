"""The command `wdmoe-export carve`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_dense
from click.testing import CliRunner

from wdmoe.export.carving import CarveConfig
from wdmoe.export.cli import main
from wdmoe.export.cli_carve import carve

_PEAK = """
import re, sys
from pathlib import Path
from typing import Any
from wdmoe.export.cli import main
main(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    tiny_dense.tiny_dense(tmp_path / "dense", "llama")
    text = tiny_dense.text_file(tmp_path / "text.txt")
    return [
        "carve",
        "--model",
        str(tmp_path / "dense"),
        "--calibration",
        str(text),
        "--tokens",
        "1024",
        "--window",
        "32",
    ]


def _run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_carving_says_what_it_made(inputs: list[str], tmp_path: Path) -> None:
    code, out, err = _run(*inputs, "--experts", 4, "--out", tmp_path / "moe")
    assert code == 0
    assert "24 shared neurons, 4 experts of 6, 2 a token: 75% of the neurons at work" in out
    assert "block 2 of 2: error on held-out text" in err
    assert "experts of 6 neurons" in err and "a multiple of 8" in err
    code, out, _ = _run(*inputs, "--experts", 4, "--out", tmp_path / "moe")
    assert (code, "already there, nothing to do" in out) == (0, True)


def test_the_result_for_programs_is_json(inputs: list[str], tmp_path: Path) -> None:
    code, out, _ = _run(*inputs, "--experts", 4, "--shared", 16, "--top-k", 1, "--out", tmp_path / "moe", "--json")
    made = json.loads(out)
    assert (code, made["already_there"], made["active_share"]) == (0, False, 0.5)
    assert made["recipe"]["calibration_tokens"] == 1024
    assert made["error"] == pytest.approx(sum(block["error"] for block in made["blocks"]) / 2)


def test_a_mistake_is_one_line_and_an_exit_code(inputs: list[str], tmp_path: Path) -> None:
    code, _, err = _run(*inputs, "--experts", 5, "--shared", 20, "--out", tmp_path / "moe")
    assert code == 2
    assert "give --shared 18 or 23" in err
    code, _, err = _run(*inputs, "--window", 512, "--out", tmp_path / "moe")
    assert (code, "--window 512 is more than the model's 256 positions" in err) == (2, True)
    (tmp_path / "dense" / "tokenizer.json").unlink()
    code, _, err = _run(*inputs, "--out", tmp_path / "moe")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "tokenizer.json: missing" in err


def test_help_gives_defaults_and_an_example() -> None:
    code, out, _ = _run("carve", "--help")
    assert code == 0
    for words in ("[default: 8;", "[default: layer]", "half of a block's", "wdmoe-export carve --model ~/Llama-3.2-1B"):
        assert words in " ".join(out.split())


def test_the_command_and_the_library_have_the_same_defaults() -> None:
    given = {option.name: option.default for option in carve.params}
    config = CarveConfig(Path("out"), ())
    names = [
        "experts",
        "top_k",
        "distil",
        "tokens",
        "window",
        "seed",
        "expert_neurons",
        "steps",
        "batch",
        "rank",
        "rate",
    ]
    for name in [*names, "torch_device", "compiled", "recompute"]:
        assert given[name] == getattr(config, name), name


def test_the_folder_that_one_stands_in_can_be_the_result(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _run(*inputs, "--experts", 4, "--out", ".")[0] == 0
    assert (tmp_path / "here" / "config.json").is_file()


TRAINED = ("--distil", "end-to-end", "--experts", 4, "--tokens", 4096, "--no-compile")


def test_an_option_of_the_training_alone_is_refused_without_one(inputs: list[str], tmp_path: Path) -> None:
    for option in (["--steps", 5], ["--rate", 0.1], ["--recompute"], ["--no-compile"], ["--expert-neurons", 8]):
        code, _, err = _run(*inputs, *option, "--out", tmp_path / "moe")
        name = "--compile" if option == ["--no-compile"] else option[0]
        assert (code, f"{name} is of --distil end-to-end; layer has no use for it" in err) == (2, True)


def test_training_without_torch_says_what_to_install(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wdmoe.export.cli_carve.find_spec", lambda _name: None)
    code, _, err = _run(*inputs, *TRAINED, "--out", tmp_path / "moe")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "pip install 'wdmoe[export,distil]'" in err
    assert _run(*inputs, "--experts", 4, "--out", tmp_path / "moe")[0] == 0  # layer by layer needs none


def test_a_training_says_what_it_made(inputs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code, out, err = _run(*inputs, *TRAINED, "--steps", 2, "--out", tmp_path / "moe")
    assert code == 0, err
    assert "2 blocks: 16 shared neurons, 4 overlapping experts of 8, 2 a token: 67% of the neurons at work" in out
    assert "before training" in out and "of the dense model" in out
    assert "planning 2 of 2" in err and "training 2 of 2: loss" in err and "writing 2 of 2" in err
    code, out, _ = _run(*inputs, *TRAINED, "--steps", 2, "--out", tmp_path / "moe", "--json")
    made = json.loads(out)
    assert (code, made["already_there"], made["recipe"]["steps"]) == (0, True, 2)
    assert made["trained_perplexity"] > 1
    code, _, err = _run(*inputs, *TRAINED, "--top-k", 1, "--out", tmp_path / "other")
    assert (code, "--top-k 1 of --experts 4" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_training_goes_on_and_ends_the_same(
    inputs: list[str], tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "from wdmoe.export import cli_carve, cli; cli_carve._LINE_EVERY_S = 0.0; cli.main()"

    def begun(out: Path) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", code, *inputs, *map(str, TRAINED), "--steps", "40", "--out", str(out)]
        return subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    with begun(tmp_path / "whole") as process:
        assert process.communicate(timeout=200)[1] and process.returncode == 0
    with begun(tmp_path / "moe") as process:
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith("training 25 of"):
                process.send_signal(number)
                break
        rest = process.stderr.read()
        code_of_exit = process.wait(timeout=60)
    assert code_of_exit == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "the same command goes on from" in rest and "Traceback" not in rest
    assert not (tmp_path / "moe").exists()
    with begun(tmp_path / "moe") as process:
        lines = process.communicate(timeout=200)[1].splitlines()
        assert process.returncode == 0
    steps = [int(line.split()[1]) for line in lines if line.startswith("training")]
    assert steps[0] in {20, 30, 40} and steps[-1] == 40 and not any(line.startswith("planning") for line in lines)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "moe" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_goes_on_and_ends_the_same(inputs: list[str], tmp_path: Path, number: signal.Signals) -> None:
    tiny_dense.tiny_dense(tmp_path / "large", "llama", hidden_size=128, intermediate_size=512, num_hidden_layers=12)
    inputs[2] = str(tmp_path / "large")
    assert _run(*inputs, "--out", tmp_path / "whole")[0] == 0
    line = [sys.executable, "-c", "from wdmoe.export.cli import main; main()", *inputs, "--out", str(tmp_path / "moe")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith("block 3 of"):
                process.send_signal(number)
                break
        rest = process.stderr.read()
        code = process.wait(timeout=60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "the same command goes on from" in rest and "Traceback" not in rest
    assert not (tmp_path / "moe").exists()
    assert len(list((tmp_path / "moe.partial").glob("model-*.safetensors"))) >= 3
    started = time.time()
    assert _run(*inputs, "--out", tmp_path / "moe")[0] == 0
    kept = [path for path in (tmp_path / "moe").glob("model-*.safetensors") if path.stat().st_mtime < started]
    assert len(kept) >= 3
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "moe" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_eight_blocks_need_no_more_memory_than_two(inputs: list[str], tmp_path: Path) -> None:
    peaks_kb: list[int] = []
    for blocks in (2, 8):
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": blocks}
        inputs[2] = str(tiny_dense.tiny_dense(tmp_path / f"dense{blocks}", "llama", **shape))
        line = [sys.executable, "-c", _PEAK, *inputs, "--distil", "none", "--out", str(tmp_path / f"moe{blocks}")]
        done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=200)
        peaks_kb.append(int(done.stdout.splitlines()[-1]))
    block_kb = (3 * 256 * 2048 + 3 * 256 * 256) * 4 / 1024  # of the six blocks more: 42 MB
    assert peaks_kb[1] - peaks_kb[0] < 1.5 * block_kb, peaks_kb
