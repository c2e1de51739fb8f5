from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from inprocess import open_system, run_sequence
from processes import command, device_processes, free_address

from wdmoe.bs.cli import main
from wdmoe.bs.cli_generate import interruptible, kept_alive


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    """Four device processes over loopback, one base station after another."""
    chosen = free_address()
    with device_processes(bundle, chosen, ["--engine", "numpy"]):
        yield chosen


def options(bundle: Path, address: str, *more: object) -> list[str]:
    return ["generate", "--bundle", str(bundle), "--listen", address, "--wait", "30", "--threads", "1", *map(str, more)]


def test_a_text_is_streamed_and_its_timing_told(bundle: Path, address: str) -> None:
    result = CliRunner().invoke(main, options(bundle, address, "--prompt", "How does one", "--max-tokens", 12))
    assert result.exit_code == 0, result.output
    assert len(result.stdout) > 1 and result.stdout.endswith("\n")
    assert "12 tokens, " in result.stderr and "waiting" in result.stderr and "first token after" in result.stderr
    assert "seed" not in result.stderr  # greedy


def test_the_seed_that_is_told_repeats_the_text(bundle: Path, address: str) -> None:
    drawn = ("--prompt", "-", "--max-tokens", 16, "--temperature", 1.5, "--top-p", 0.95, "--json", "-")
    first = CliRunner().invoke(main, options(bundle, address, *drawn), input="How does one\n")
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert f"seed {answer['seed']}" in first.stderr
    repeated = ("--prompt", "How does one", *drawn[2:], "--seed", answer["seed"], "--policy", "exact")
    again = json.loads(CliRunner().invoke(main, options(bundle, address, *repeated)).stdout)
    for field in ("text", "token_ids", "finish", "seed", "policy", "prompt_tokens"):
        assert again[field] == answer[field]
    assert answer["finish"] in ("length", "eos") and answer["policy"] == "exact" and answer["wire"] == "fp16"
    assert answer["timing"]["first_token_ms"] > 0 and answer["timing"]["waiting_ms_per_token"] > 0


def test_a_text_in_virtual_time_is_the_same_and_its_times_are_modelled(bundle: Path, address: str) -> None:
    asked = ("--prompt", "How does one", "--max-tokens", 8, "--json", "-")
    real = json.loads(CliRunner().invoke(main, options(bundle, address, *asked)).stdout)
    fleet = ("--clock", "virtual", "--devices", ",".join(["orin-nano-8gb"] * 4), "--link", "wifi-6", "--stage-ms", 2)
    first, second = (CliRunner().invoke(main, options(bundle, address, *asked, *fleet)) for _ in range(2))
    assert "times modelled" in first.stderr
    answer = json.loads(first.stdout)
    assert answer["token_ids"] == real["token_ids"]
    assert answer["clock"]["kind"] == "virtual" and real["clock"] == {"kind": "real"}
    assert answer["timing"] == json.loads(second.stdout)["timing"]
    refused = CliRunner().invoke(main, options(bundle, address, "--chat", *fleet))
    assert refused.exit_code == 2 and "--chat without a text waits for a person" in refused.output


def test_a_question_in_the_chat_format_can_be_kept(bundle: Path, address: str, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    asked = ("--chat", "Bread?", "--system", "Be brief.", "--max-tokens", 5, "--json", path)
    result = CliRunner().invoke(main, options(bundle, address, *asked))
    assert result.exit_code == 0, result.output
    answer = json.loads(path.read_text())
    assert answer["text"] + "\n" == result.stdout
    assert answer["prompt_tokens"] == len("system: Be brief.\nuser: Bread?\n")


def test_a_conversation_goes_line_by_line(bundle: Path, address: str) -> None:
    lines = f"Bread?\n\nRice?\n{'x' * 300}\n/clear\nBread?\n/exit\nnever\n"
    result = CliRunner().invoke(main, options(bundle, address, "--max-tokens", 6, "--chat"), input=lines)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("6 tokens, ") == 3
    assert "shorten the prompt" in result.stderr and "/clear starts anew" in result.stderr
    shown = result.stdout.splitlines(keepends=True)
    assert shown[0] == shown[-1] or result.stdout.startswith("".join(shown[-1:]))  # greedy, and nothing remembered
    ended = CliRunner().invoke(main, options(bundle, address, "--max-tokens", 6, "--chat"), input="Bread?\n")
    assert ended.exit_code == 0 and ended.stderr.count("6 tokens, ") == 1


class Talk:
    """A `wdmoe-bs generate` of its own process, read as it writes."""

    def __init__(self, arguments: list[str]) -> None:
        line = command("wdmoe-bs", *arguments)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)

    def read_some(self) -> bytes:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready, "nothing was written"
        some = os.read(self.process.stdout.fileno(), 4096)
        assert some, self.end()
        return some

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.decode()


def test_ctrl_c_ends_a_text_with_its_timing(bundle: Path, address: str) -> None:
    talk = Talk(options(bundle, address, "--prompt", "How does one", "--max-tokens", 240))
    assert talk.read_some()
    talk.process.send_signal(signal.SIGINT)
    code, errors = talk.end()
    assert code == 130 and " tokens/s" in errors and "cancelled" in errors
    assert "240 tokens" not in errors and "Traceback" not in errors


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation(bundle: Path, address: str) -> None:
    talk = Talk(options(bundle, address, "--chat", "--max-tokens", 100))
    assert talk.process.stdin is not None
    talk.process.stdin.write(b"How does one?\n")
    assert talk.read_some()
    talk.process.send_signal(signal.SIGINT)
    talk.process.stdin.write(b"And now?\n")
    written = b""
    while b"\n" not in written:  # the end of the first answer
        written += talk.read_some()
    while not written.partition(b"\n")[2]:  # the beginning of the second
        written += talk.read_some()
    talk.process.send_signal(signal.SIGINT)
    assert talk.process.stderr is not None
    told = b""
    while told.count(b"cancelled") < 2:
        told += os.read(talk.process.stderr.fileno(), 4096)
    time.sleep(0.3)  # until it reads the next line
    talk.process.send_signal(signal.SIGINT)
    code, errors = talk.end()
    assert code == 130 and "interrupted" in errors and "Traceback" not in errors


def test_devices_are_heard_while_a_user_thinks(bundle: Path) -> None:
    with open_system(bundle) as system:
        with kept_alive(system.pipeline):
            deadline_s = time.monotonic() + 20
            while system.clock.now_s() < 60 and time.monotonic() < deadline_s:
                time.sleep(0.001)  # of the virtual minute
        now_s = system.clock.now_s()
        assert now_s >= 60
        assert all(now_s - device.last_heard_s < 3 for device in system.hub.devices.values())
        assert len(run_sequence(system, [1, 2, 3])) == 3
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_the_first_ctrl_c_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as cancelled:
        assert not cancelled()
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_that_gets_no_signals_can_write_too() -> None:
    seen: list[bool] = []

    def write() -> None:
        with interruptible() as cancelled:
            seen.append(cancelled())

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --prompt TEXT or --chat"),
        (["--prompt", "a", "--chat", "b"], "give either --prompt TEXT or --chat"),
        (["--prompt", "a", "--system", "b"], "--system belongs to --chat"),
        (["--chat", "--json", "-"], "--json needs a question"),
        (["--prompt", "a", "--top-p", "0"], "top-p is 0.0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--max-tokens", "0"], "max-tokens is 0"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--policy", "fastest"], "unknown policy 'fastest'"),
    ],
)
def test_a_users_mistake_is_told_before_devices_are_waited_for(bundle: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["generate", "--bundle", str(bundle), *arguments])
    assert result.exit_code == 2 and words in result.output
    assert "Traceback" not in result.output and "waiting" not in result.output


def test_help_answers_without_heavy_imports() -> None:
    result = CliRunner().invoke(main, ["generate", "--help"])
    assert result.exit_code == 0 and "[default: 128]" in result.output and 'generate --prompt "' in result.output
    script = (
        "import sys\nfrom wdmoe.bs.cli import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'onnxruntime', 'tokenizers', 'jinja2', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
