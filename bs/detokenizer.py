"""From tokens to text while they come: nothing is shown that a later token could change or take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no character yet
_OPEN_BYTES = 3  # at most these can wait for the rest of their UTF-8 character, and a token is at least one byte
_CONTEXT_TOKENS = 8  # of the prompt; a decoder may treat the first token of a text in a special way


class Detokenizer:
    """Decodes one token after the other; special tokens become no text.

    NOTE: `tokenizers.decoders.DecodeStream` does not serve here: it came with tokenizers 0.21, cannot know the prompt
    before 0.22, and up to 0.21 raises "Invalid prefix" on some texts (huggingface/tokenizers#1705).

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prompt: tokens before the first; " and" after "bread" keeps its space only if the decoder sees what it follows.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])  # tokens to decode together
        self._returned = len(self._window)  # of these, those whose text was returned
        self._text = self._decode(self._window)  # of the window's text, what was returned

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._window.append(token)
        return self._certain(final=False)

    def finish(self) -> str:
        """Return the text of tokens that are still held: there will be no more."""
        return self._certain(final=True)

    def _certain(self, final: bool) -> str:
        text = self._decode(self._window)
        unfinished = 0 if final else len(text) - len(text.rstrip(_UNFINISHED))
        if unfinished and len(self._window) - self._returned <= _OPEN_BYTES:
            return ""
        if not text.startswith(self._text):
            # Bytes that make no character can spoil those before them too (byte fallback), but these are returned.
            self._window, self._returned, self._text = self._window[self._returned :], 0, ""
            text = self._decode(self._window)
        certain = text[: len(text) - min(unfinished, _OPEN_BYTES)]
        new = certain[len(self._text) :]
        if new:
            self._text = certain
        if new and not unfinished:  # tokens without a text stay: what comes next follows the text before them
            self._window = self._window[self._returned :]
            self._returned = len(self._window)
            self._text = self._decode(self._window)
        return new

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class StopFilter:
    """Ends a text before the first stop string; holds back what may turn out to begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what is certainly not part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        if (found := min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)) >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        may_begin = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - may_begin
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back: it begins no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins, without all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
