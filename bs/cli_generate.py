"""`wdmoe-bs generate`."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from wdmoe.bs.cli_common import (
    command_line,
    json_option,
    model_options,
    parse_policies,
    reported_errors,
    say,
    station_options,
    write_json,
)
from wdmoe.bs.cli_virtual import open_any_station, read_virtual, virtual_options
from wdmoe.bs.config import StationConfig
from wdmoe.bs.sampling import Sampling
from wdmoe.runtime.stopping import StopFlag

if TYPE_CHECKING:
    from wdmoe.bs.chat import Conversation
    from wdmoe.bs.generation import Completion
    from wdmoe.bs.pipeline import Pipeline

OnText = Callable[[str], None]
Cancelled = Callable[[], bool]
_DEFAULTS = Sampling()
_INTERACTIVE = ""  # what --chat without a text stands for
_EPILOG = """\b
Examples:
  wdmoe-bs generate --prompt "The ferry leaves at"
  wdmoe-bs generate --chat "How does bread stay fresh?" --temperature 0.7 --top-p 0.9
  wdmoe-bs generate --chat
"""


@click.command(epilog=_EPILOG)
@station_options
@click.option("--prompt", metavar="TEXT", help="Continue this text; - reads it from stdin.")
@click.option(
    "--chat",
    metavar="[TEXT]",
    is_flag=False,
    flag_value=_INTERACTIVE,
    help="Answer this question in the model's chat format; without TEXT, a conversation line by line "
    "(/clear starts anew, /exit or Ctrl-D ends it, Ctrl-C cancels an answer).",
)
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--temperature", type=float, default=_DEFAULTS.temperature, help="0: always the most likely token.")
@click.option(
    "--top-p", type=float, default=_DEFAULTS.top_p, help="Draw from the tokens that make up this probability."
)
@click.option("--max-tokens", type=int, default=_DEFAULTS.max_tokens, help="Length of an answer at most.")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given several times."
)
@click.option(
    "--seed",
    type=int,
    help="Of the random draws, not of modelled links; without it one is drawn, and told at the end.",
)
@click.option("--policy", default="exact", help="As for wdmoe-bs run; one.")
@model_options
@partial(virtual_options, seed=False)  # it has one of its own
@json_option
def generate(
    prompt: str | None,
    chat: str | None,
    system: str | None,
    policy: str,
    json_path: Path | None,
    stop: tuple[str, ...],
    seed: int | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    clock: str,
    **station: Any,
) -> None:
    """Continue a text or chat, word by word; where the time went is told at the end.

    With --clock virtual the text is real and times are modelled. Ctrl-C ends an answer after the token that is being
    computed, a second Ctrl-C at once; exit code 130.
    """
    with reported_errors():
        from wdmoe.bs.chat import Conversation, load_chat_template
        from wdmoe.bs.generation import CachedModel, Writer, load_tokenizer
        from wdmoe.bs.results import describe_clock
        from wdmoe.bs.station import bs_folder
        from wdmoe.runtime.manifest import BsManifest, read_manifest

        _check_usage(prompt, chat, system, json_path)
        virtual = read_virtual(clock, station)
        if virtual is not None and chat == _INTERACTIVE:
            raise ValueError("--chat without a text waits for a person, which --clock virtual cannot; give --chat TEXT")
        config = StationConfig(**station)
        (chosen,) = parse_policies((policy,), config.bundle)
        sampling = Sampling(temperature, top_p, max_tokens, stop, secrets.randbits(32) if seed is None else seed)
        # What cannot work is said before anybody waits for devices.
        folder = bs_folder(config.bundle)
        manifest = read_manifest(folder, BsManifest)
        tokenizer = load_tokenizer(folder, manifest)
        template = None if chat is None else load_chat_template(folder, manifest, tokenizer)
        if prompt == "-":
            prompt = sys.stdin.read().removesuffix("\n")

        with open_any_station(config, virtual) as open_:
            model = CachedModel(open_.pipeline, manifest.model, chosen)
            writer = Writer(model, tokenizer, manifest.model.eos_token_ids, open_.hub.clock)
            answer: Callable[[OnText, Cancelled], Completion]
            if template is None:
                answer = partial(writer.answer, tokenizer.encode(prompt).ids, sampling, sampling.rng())
            else:
                conversation = Conversation(writer, tokenizer, template, sampling, system)
                if chat == _INTERACTIVE:
                    _converse(conversation, open_.pipeline, sampling)
                    return
                assert chat is not None
                answer = partial(conversation.ask, chat)
            completion = _shown(answer, sampling, streaming=str(json_path) != "-", modelled=virtual is not None)
        if json_path is not None:
            described = {
                "model": manifest.model.name,
                **asdict(completion),
                "policy": chosen.describe(),
                "wire": config.wire,
                "split": config.split,
                "clock": describe_clock(virtual, config, open_.shares),
                **asdict(sampling),
                "command": command_line(),
            }
            write_json(json_path, described)
    if completion.finish == "cancelled":
        raise SystemExit(130)


def _check_usage(prompt: str | None, chat: str | None, system: str | None, json_path: Path | None) -> None:
    if (prompt is None) == (chat is None):
        raise click.UsageError("give either --prompt TEXT or --chat [TEXT]")
    if system is not None and chat is None:
        raise click.UsageError("--system belongs to --chat")
    if chat == _INTERACTIVE and json_path is not None:
        raise click.UsageError("--json needs a question: --chat TEXT")


def _converse(conversation: Conversation, pipeline: Pipeline, sampling: Sampling) -> None:
    """Read lines and answer them, until the end of input or /exit."""
    while (line := _read_line(pipeline)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/clear":
                conversation.clear()
            case question:
                try:
                    _shown(partial(conversation.ask, question), sampling)
                except ValueError as error:
                    say(f"{error} (/clear starts anew)")


def _shown(
    answer: Callable[[OnText, Cancelled], Completion],
    sampling: Sampling,
    streaming: bool = True,
    modelled: bool = False,
) -> Completion:
    """Show an answer while it comes, and the line about its timing."""
    with interruptible() as cancelled:
        completion = answer(_stream if streaming else _keep_quiet, cancelled)
    if streaming:
        click.echo()
    notes = [completion.timing.describe(len(completion.token_ids))]
    if modelled:
        notes.append("times modelled")
    if completion.finish == "cancelled":
        notes.append("cancelled")
    if sampling.temperature > 0:
        notes.append(f"seed {sampling.seed}")
    say(", ".join(notes))
    return completion


def _stream(text: str) -> None:
    click.echo(text, nl=False)


def _keep_quiet(text: str) -> None:
    pass


@contextmanager
def interruptible() -> Iterator[Cancelled]:
    """Let the first Ctrl-C only ask for a stop, so that the KV cache stays whole; the second one interrupts."""
    asked = StopFlag()
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield asked.is_set
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _read_line(pipeline: Pipeline) -> str | None:
    """Read a line of the user; None at the end of input. The devices' heartbeats go on meanwhile."""
    with kept_alive(pipeline):
        if sys.stdin.isatty() and sys.stdout.isatty():
            import readline  # noqa: F401 - gives `input` line editing and history

            try:
                return input("> ")
            except EOFError:
                click.echo()
                return None
        return sys.stdin.readline() or None


@contextmanager
def kept_alive(pipeline: Pipeline) -> Iterator[None]:
    """Let a thread keep the devices while this one waits for the user: else the devices think the base station gone."""
    done = threading.Event()

    def turn() -> None:
        while not done.is_set():
            pipeline.idle(1.0)

    thread = threading.Thread(target=turn, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        pipeline.wake()
        thread.join()
