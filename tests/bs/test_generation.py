"""Texts written over the link's twin in memory: equality with the oracle, and where a text ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from inprocess import Handler, System, open_system, run_sequence

from wdmoe.bs.chat import ChatTemplate, Conversation
from wdmoe.bs.generation import CachedModel, Completion, Writer, common_prefix, load_tokenizer
from wdmoe.bs.microbatch import KvCache
from wdmoe.bs.policies import Exact
from wdmoe.bs.sampling import Sampling
from wdmoe.runtime.clock import VirtualClock
from wdmoe.runtime.errors import DeviceTimeout
from wdmoe.runtime.messages import Frame

PROMPT = list(b"How does one keep bread fresh?")


class Setup:
    """A connected system and what is needed to write with it."""

    def __init__(self, system: System, bundle: Path) -> None:
        self.system = system
        self.tokenizer = load_tokenizer(bundle / "bs", system.manifest)
        self.model = CachedModel(system.pipeline, system.manifest.model, Exact())
        self.writer = self.writer_ending_at(*system.manifest.model.eos_token_ids)

    def writer_ending_at(self, *eos: int) -> Writer:
        return Writer(self.model, self.tokenizer, eos, self.system.clock)

    def answer(self, prompt: list[int], sampling: Sampling, **options: Any) -> Completion:
        return self.writer.answer(prompt, sampling, sampling.rng(), **options)


@pytest.fixture
def setup(bundle: Path) -> Iterator[Setup]:
    with open_system(bundle) as system:
        yield Setup(system, bundle)


def greedy_of_transformers(checkpoint: Path, prompt: list[int], tokens: int) -> list[int]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=tiny.EOS
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def test_greedy_text_is_that_of_transformers(any_bundle: Path) -> None:
    expected = greedy_of_transformers(any_bundle.parent / "checkpoint", PROMPT, 64)
    with open_system(any_bundle) as system:
        setup = Setup(system, any_bundle)
        completion = setup.answer(PROMPT, Sampling(max_tokens=64))
    assert list(completion.token_ids) == expected
    assert completion.finish == ("eos" if expected[-1] == tiny.EOS else "length")


def test_a_prompt_in_chunks_gives_the_logits_of_one_pass(any_bundle: Path) -> None:
    prompt = np.random.default_rng(0).integers(0, 256, 101).tolist()
    with open_system(any_bundle) as system:
        at_once = run_sequence(system, prompt)[-1]
        for chunk in (101, 64, 7, 1):
            model = CachedModel(system.pipeline, system.manifest.model, Exact(), chunk_tokens=chunk)
            model.rewind(prompt, 1)
            logits = model.feed(prompt)
            assert logits is not None and len(model.records) == -(-len(prompt) // chunk)
            np.testing.assert_allclose(logits, at_once, atol=2e-5)


def test_a_cache_that_is_kept_gives_the_logits_of_a_fresh_one(any_bundle: Path) -> None:
    continued = [*PROMPT, *b" In a box?"]
    branched = [*PROMPT[:11], *b"store rice for a year, and where would one look for it?"]
    with open_system(any_bundle) as system:
        model = CachedModel(system.pipeline, system.manifest.model, Exact())
        for prompt, kept in ((PROMPT, 0), (continued, len(PROMPT)), (branched, 11), (branched, len(branched) - 1)):
            assert model.rewind(prompt, 4) == kept
            logits = model.feed(prompt[kept:])
            assert logits is not None
            np.testing.assert_allclose(logits, run_sequence(system, prompt)[-1], atol=2e-5)


def test_the_same_seed_writes_the_same_text(setup: Setup) -> None:
    first, again, other = (setup.answer(PROMPT, Sampling(1.0, 0.9, 24, seed=seed)) for seed in (1, 1, 2))
    assert first.text == again.text and first.token_ids == again.token_ids
    assert other.token_ids != first.token_ids


def test_a_tiny_top_p_is_greedy(setup: Setup) -> None:
    greedy = setup.answer(PROMPT, Sampling(max_tokens=24))
    assert setup.answer(PROMPT, Sampling(1.5, 1e-9, 24, seed=3)).token_ids == greedy.token_ids


def test_the_text_is_that_of_the_tokens_and_comes_in_pieces(setup: Setup) -> None:
    pieces: list[str] = []
    completion = setup.answer(PROMPT, Sampling(2.0, max_tokens=60, seed=4), on_text=pieces.append)
    ids = [token for token in completion.token_ids if token != tiny.EOS]
    assert completion.text == "".join(pieces) == setup.tokenizer.decode(ids)
    assert len(pieces) > 10


def test_an_answer_ends_after_max_tokens(setup: Setup) -> None:
    for tokens in (1, 2, 9):
        completion = setup.answer(PROMPT, Sampling(max_tokens=tokens))
        assert completion.finish == "length" and len(completion.token_ids) == tokens
        assert (completion.timing.waiting_ms_per_token is None) == (tokens == 1)


def test_an_answer_ends_at_the_models_own_end(setup: Setup) -> None:
    long = setup.answer(PROMPT, Sampling(max_tokens=20))
    end = next(token for token in long.token_ids[5:] if token < 128)
    setup.writer = setup.writer_ending_at(tiny.EOS, end)
    completion = setup.answer(PROMPT, Sampling(max_tokens=20))
    length = long.token_ids.index(end) + 1
    assert completion.finish == "eos" and completion.token_ids == long.token_ids[:length]
    assert completion.text == setup.tokenizer.decode(list(long.token_ids[: length - 1]))


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it(setup: Setup) -> None:
    sampling = Sampling(2.0, max_tokens=100, seed=6)
    whole = setup.answer(PROMPT, sampling).text
    stop = whole[20:24]
    start = whole.index(stop)
    pieces: list[str] = []
    completion = setup.answer(
        PROMPT, Sampling(2.0, max_tokens=100, seed=6, stop=(stop, "never")), on_text=pieces.append
    )
    assert completion.finish == "stop"
    assert completion.text == "".join(pieces) == whole[:start]
    assert len(completion.token_ids) < 100


def test_cancelling_keeps_what_was_written_and_a_usable_cache(setup: Setup) -> None:
    whole = setup.answer(PROMPT, Sampling(max_tokens=12))
    setup.model.rewind([0], 1)  # forget it
    polls = iter([False] * 6 + [True])
    completion = setup.answer(PROMPT, Sampling(max_tokens=12), cancelled=lambda: next(polls))
    assert completion.finish == "cancelled" and completion.token_ids == whole.token_ids[:6]
    assert whole.text.startswith(completion.text)
    again = setup.answer(PROMPT, Sampling(max_tokens=12))
    assert again.token_ids == whole.token_ids and again.reused_tokens == len(PROMPT) - 1


def test_cancelling_at_once_gives_nothing(setup: Setup) -> None:
    completion = setup.answer(PROMPT, Sampling(), cancelled=lambda: True)
    assert (completion.text, completion.token_ids, completion.finish) == ("", (), "cancelled")
    assert completion.timing.first_token_ms is None


def test_what_does_not_fit_the_model_is_refused_with_what_would(setup: Setup) -> None:
    prompt = [65] * 250
    with pytest.raises(ValueError, match=r"knows 256; shorten the prompt or give --max-tokens 6 or less"):
        setup.answer(prompt, Sampling(max_tokens=7))
    assert len(setup.answer(prompt, Sampling(max_tokens=6)).token_ids) == 6
    with pytest.raises(ValueError, match="no tokens"):
        setup.answer([], Sampling())


def test_a_failed_device_is_named_and_the_next_answer_starts_afresh(setup: Setup) -> None:
    expected = setup.answer(PROMPT, Sampling(max_tokens=8))
    handler = setup.system.link.peers.pop(b"device-1")
    with pytest.raises(DeviceTimeout, match="device-1"):
        setup.answer(PROMPT, Sampling(max_tokens=8))
    setup.system.link.peers[b"device-1"] = handler
    again = setup.answer(PROMPT, Sampling(max_tokens=8))
    assert again.token_ids == expected.token_ids and again.reused_tokens == 0


def test_the_times_add_up(any_bundle: Path) -> None:
    """On the virtual clock, where nothing but an exchange with a device takes time."""
    with open_system(any_bundle) as system:
        setup = Setup(system, any_bundle)
        for name, handler in list(system.link.peers.items()):
            system.link.peers[name] = slow(handler, system.clock)
        timing = setup.answer(PROMPT, Sampling(max_tokens=11)).timing
    assert timing.first_token_ms is not None and timing.tokens_per_s is not None
    decoding_ms = 1e3 * 10 / timing.tokens_per_s
    assert timing.total_ms == pytest.approx(timing.first_token_ms + decoding_ms)
    # Top-2 in two blocks: two to four requests a token of 5 ms each, on this link one after another; and some pings.
    assert 10 - 1e-6 <= decoding_ms / 10 <= 25
    assert timing.waiting_ms_per_token is not None
    if not system.manifest.model.shared_expert:  # it is computed inline here, after the replies, and hides all waiting
        assert timing.waiting_ms_per_token == pytest.approx(decoding_ms / 10)
    assert re.fullmatch(
        r"11 tokens, [\d.]+ tokens/s, first token after \d+ ms, waiting [\d.]+ ms per token", timing.describe(11)
    )


def slow(handler: Handler, clock: VirtualClock) -> Handler:
    def handle(frames: Sequence[Frame]) -> Iterable[Sequence[Frame]]:
        answers = list(handler(frames))
        clock.advance(0.005)
        return answers

    return handle


def talk(setup: Setup, sampling: Sampling, system: str | None = None) -> Conversation:
    template = ChatTemplate(tiny.CHAT_TEMPLATE + "{% if add_generation_prompt %}assistant: {% endif %}", {})
    return Conversation(setup.writer, setup.tokenizer, template, sampling, system)


def test_a_conversation_reuses_its_beginning_and_answers_as_from_scratch(setup: Setup) -> None:
    chat = talk(setup, Sampling(max_tokens=8), "Be brief.")
    first = chat.ask("Bread?")
    second = chat.ask("Rice?")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert first.reused_tokens == 0 and second.reused_tokens >= first.prompt_tokens
    setup.model.rewind([0], 1)  # forget it
    other = talk(setup, Sampling(max_tokens=8), "Be brief.")
    other.messages = chat.messages[:3]
    again = other.ask("Rice?")
    assert again.token_ids == second.token_ids and again.reused_tokens == 0


def test_a_conversation_forgets_a_turn_that_came_to_nothing(setup: Setup) -> None:
    chat = talk(setup, Sampling(max_tokens=8))
    assert chat.ask("Bread?", cancelled=lambda: True).finish == "cancelled"
    assert chat.messages == []
    with pytest.raises(ValueError, match="shorten the prompt"):
        chat.ask("x" * 300)
    assert chat.messages == []
    chat.ask("Bread?")
    assert len(chat.messages) == 2
    chat.clear()
    assert chat.messages == []


def test_a_cache_can_be_cut_and_grown() -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 5, 3)).astype(np.float32)
    cache = KvCache(1, 3, 5)
    cache.store(0, keys, values)
    cache.advance(5)
    cache.truncate(4)
    cache.reserve(9)
    cache.reserve(2)  # never smaller
    assert (cache.length, cache.capacity) == (4, 9)
    np.testing.assert_array_equal(cache.past(0)[0], keys[:4])
    np.testing.assert_array_equal(cache.past(0)[1], values[:4])
    with pytest.raises(ValueError, match="cannot keep 5 tokens of a KV cache that holds 4"):
        cache.truncate(5)


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 4], 1), ([5], [6], 0)]
)
def test_common_prefix(first: list[int], second: list[int], length: int) -> None:
    assert common_prefix(first, second) == length
