"""Conversations: the bundle's chat template, and a history whose beginning stays in the KV cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from wdmoe.bs.generation import Completion, Writer
from wdmoe.bs.sampling import Sampling
from wdmoe.runtime.errors import BundleError, EngineError
from wdmoe.runtime.manifest import BsManifest

ChatMessage = dict[str, str]  # role and content, as templates expect them


class ChatTemplate:
    """A chat template in the dialect of transformers, rendered in a sandbox: a bundle may come from anybody.

    Args:
        source: the template, Jinja.
        special_tokens: what it may name, such as bos_token.
        now: tells the date to templates that ask for it.

    Raises:
        BundleError: it is not a template.
        EngineError: jinja2 is not installed.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        try:
            import jinja2
        except ImportError as error:
            raise EngineError(f"--chat needs jinja2 ({error}): pip install 'wdmoe[bs]'") from error
        self._template_error = jinja2.TemplateError
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"the chat template cannot be read: {error}; export the model again") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Write a conversation down as the model was trained to see it, up to where its answer begins.

        Raises:
            ValueError: the template refuses the conversation, for example a system message.
        """
        try:
            text: str = self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except self._template_error as error:
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
        return text


class Conversation:
    """Questions and answers so far; each answer is given in the light of all before it.

    Args:
        writer: answers.
        tokenizer: a `tokenizers.Tokenizer`.
        template: of the model.
        sampling: how to answer; one sequence of random numbers serves the whole conversation.
        system: a system message to begin with.
    """

    def __init__(
        self, writer: Writer, tokenizer: Any, template: ChatTemplate, sampling: Sampling, system: str | None = None
    ) -> None:
        self.messages: list[ChatMessage] = []
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._writer = writer
        self._tokenizer = tokenizer
        self._template = template
        self._sampling = sampling
        self._rng = sampling.rng()
        self.clear()

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._opening)

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] = lambda text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Put a question; see `Writer.answer`. A turn that fails, or is cancelled before its first word, is forgotten.

        Raises:
            ValueError: the conversation has become too long for the model, or its template refuses it.
            DeviceError, DevicesMissing: as `Pipeline.run`.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids
        completion = self._writer.answer(prompt, self._sampling, self._rng, on_text, cancelled)
        if completion.finish != "cancelled" or completion.text:
            self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        return completion


def load_chat_template(folder: Path, manifest: BsManifest, tokenizer: Any) -> ChatTemplate:
    """Open a bundle's chat template, with the model's BOS and EOS as the tokens it may name.

    Raises:
        BundleError: the bundle has none, or it is damaged.
    """
    if manifest.chat_template is None:
        raise BundleError(
            f"{folder}: {manifest.model.name} comes without a chat template; take --prompt, or export the instruct model"
        )
    ids = {"bos_token": manifest.model.bos_token_id, "eos_token": next(iter(manifest.model.eos_token_ids), None)}
    texts = {name: tokenizer.id_to_token(token) for name, token in ids.items() if token is not None}
    source = (folder / manifest.chat_template).read_text(encoding="utf-8")
    return ChatTemplate(source, {name: text for name, text in texts.items() if text is not None})


def _environment(now: Callable[[], datetime]) -> Any:
    """Build what transformers' chat templates expect around them."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment
