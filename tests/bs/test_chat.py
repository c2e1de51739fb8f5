from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import tiny

from wdmoe.bs.chat import ChatMessage, ChatTemplate
from wdmoe.runtime.errors import BundleError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK: list[ChatMessage] = [
    {"role": "system", "content": "Be brief <&>."},
    {"role": "user", "content": 'Say "hi"\n  twice.'},
    {"role": "assistant", "content": "hi hi"},
    {"role": "user", "content": "Thanks \N{BREAD}"},
]
CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {{- bos_token }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
EVERYTHING = """\
{%- set ns = namespace(turn=0) -%}
  {% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
    {% else %}[{{ ns.turn }}] {{ message | tojson }} {{ message | tojson(indent=2) }}
    {% endif %}
    {%- if ns.turn > 2 %}{% break %}{% endif %}
  {% endfor %}
{{ tools is none }} {{ documents is none }} {{ pad_token is defined }} {{ strftime_now('%Y') | length }}
{{- dict(a=1) | tojson }}
"""


@pytest.mark.parametrize("template", [CHATML, EVERYTHING, tiny.CHAT_TEMPLATE], ids=["chatml", "everything", "tiny"])
@pytest.mark.parametrize("messages", [TALK, TALK[1:2]], ids=["system", "single"])
def test_a_conversation_reads_as_transformers_writes_it(template: str, messages: list[ChatMessage]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(tiny.byte_tokenizer())), **TOKENS
    )
    expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(template, TOKENS).render(messages) == expected


def test_the_date_is_told_by_the_clock_that_is_passed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", {}, lambda: datetime(2030, 1, 2))
    assert template.render([]) == "02 January 2030"


def test_a_conversation_that_the_template_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('no system role') if messages[0].role == 'system' }}", {})
    with pytest.raises(ValueError, match="chat template refuses the conversation: no system role"):
        template.render(TALK)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    messages = list(TALK)
    try:
        rendered = ChatTemplate(source, {}).render(messages)
    except ValueError as error:
        assert "unsafe" in str(error) or "undefined" in str(error)
    else:
        assert rendered == ""
    assert messages == TALK


def test_a_damaged_template_is_named() -> None:
    with pytest.raises(BundleError, match="chat template cannot be read"):
        ChatTemplate("{% for message in %}", {})


def test_a_bundle_without_a_template_says_what_to_do(bundle: Path, tmp_path: Path) -> None:
    import msgspec

    from wdmoe.bs.chat import load_chat_template
    from wdmoe.runtime.manifest import BsManifest, read_manifest

    manifest = read_manifest(bundle / "bs", BsManifest)
    without = msgspec.structs.replace(manifest, chat_template=None)
    with pytest.raises(BundleError, match="comes without a chat template; take --prompt"):
        load_chat_template(tmp_path, without, None)
