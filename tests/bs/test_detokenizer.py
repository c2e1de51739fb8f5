from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import tiny

from wdmoe.bs.detokenizer import Detokenizer, StopFilter

tokenizers = pytest.importorskip("tokenizers")

TEXT = "Brot \N{BREAD} naïve — 日本語 👩‍🚀!"


def byte_level() -> object:
    return tokenizers.Tokenizer.from_str(json.dumps(tiny.byte_tokenizer()))


def byte_fallback() -> object:
    """A tokenizer in the manner of Llama and Mixtral: pieces with a space in front, other characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁and", "nd", "▁bread"]
    model = tokenizers.models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(tokenizer: object, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


def test_characters_of_several_tokens_appear_whole() -> None:
    tokens = list(TEXT.encode())
    shown = pieces_of(byte_level(), tokens)
    assert "".join(shown) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
    # Each as soon as its last byte is there.
    ends = list(itertools.accumulate(len(char.encode()) for char in TEXT))
    assert [n + 1 for n, piece in enumerate(shown) if piece] == ends


def test_characters_of_several_byte_pieces_appear_whole() -> None:
    tokenizer = byte_fallback()
    tokens = [3 + byte for byte in "\N{BREAD}\N{BREAD}é".encode()]
    shown = pieces_of(tokenizer, tokens)
    assert "".join(shown) == "\N{BREAD}\N{BREAD}é"
    assert [piece for piece in shown if piece] == ["\N{BREAD}", "\N{BREAD}", "é"]


def test_a_space_at_the_beginning_is_kept_where_the_text_goes_on() -> None:
    tokenizer = byte_fallback()
    bread, and_ = (tokenizer.token_to_id(piece) for piece in ("▁bread", "▁and"))  # type: ignore[attr-defined]
    assert "".join(pieces_of(tokenizer, [and_, bread], [1, bread])) == " and bread"
    assert "".join(pieces_of(tokenizer, [and_, 2, bread])) == "and bread"


def test_special_and_unknown_tokens_are_not_shown() -> None:
    tokens = [tiny.BOS, *b"a", tiny.EOS, 300, *b"b", tiny.EOS]
    assert "".join(pieces_of(byte_level(), tokens)) == "ab"


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\xf0\x9f", b"\xe6\x97", b"\x80" * 9], ids=str)
def test_bytes_that_are_no_text_neither_stop_nor_hide_what_follows(damage: bytes) -> None:
    tokens = [*b"ab", *damage, *b"cd", *"é".encode(), *damage]
    tokenizer = byte_level()
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)  # type: ignore[attr-defined]


def test_any_tokens_give_the_text_of_all_together() -> None:
    rng, tokenizer = np.random.default_rng(0), byte_level()
    for _ in range(200):
        tokens = rng.integers(0, tiny.VOCAB, 20).tolist()
        prompt = list(b"A prompt: ")
        assert "".join(pieces_of(tokenizer, tokens, prompt)) == tokenizer.decode(tokens)  # type: ignore[attr-defined]


def filtered(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    stop_filter = StopFilter(stops)
    shown = [stop_filter.push(piece) for piece in pieces]
    return [*shown, stop_filter.finish()], stop_filter.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        ((), ["a", "b"], ["a", "b", ""], False),
        (("END",), ["a", "E", "N", "D", "x"], ["a", "", "", "", "", ""], True),
        (("END",), ["a", "E", "N", "x"], ["a", "", "", "ENx", ""], False),
        (("END",), ["aEN", "END"], ["a", "EN", ""], True),
        (("END",), ["a", "EN"], ["a", "", "EN"], False),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (("\n\n", "Question"), ["x\n", "Quest", "ion"], ["x", "\n", "", ""], True),
        (("bc", "abcd"), ["ab", "c"], ["", "a", ""], True),
        (("x",), ["axb"], ["a", ""], True),
    ],
)
def test_no_part_of_a_stop_string_is_shown(
    stops: tuple[str, ...], pieces: list[str], shown: list[str], stopped: bool
) -> None:
    assert filtered(stops, pieces) == (shown, stopped)


def test_a_text_is_cut_at_the_same_place_however_it_comes() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        text = "".join(rng.choice(["a", "b", "c"], 12))
        stops = ("abca", "bb")
        cuts = sorted(rng.choice(np.arange(1, 12), 4, replace=False).tolist())
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, 12])]
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        shown, stopped = filtered(stops, pieces)
        assert stopped == bool(found)
        # Where two stop strings overlap, the one that is complete first decides.
        first = min((end for stop in stops if (end := text.find(stop) + len(stop)) >= len(stop)), default=None)
        assert text.startswith("".join(shown))
        assert first is None or "".join(shown) in {text[:at] for at in found}
