"""Our rendering of a template is that of transformers, byte for byte."""

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest

from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.tiny_tokenizer import FAMILIES, build_family_tokenizer, build_tiny_tokenizer

CONVERSATIONS: list[list[dict[str, object]]] = [
    [{"role": "user", "content": "Hi <b>&</b> \n"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello\n"}],
    [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "ü\u2028🎉"},
    ],
]
WITH_SYSTEM = [[{"role": "system", "content": "Be\tbrief"}, *rows] for rows in CONVERSATIONS]
TOOLS: list[object] = [{"type": "function", "function": {"name": "f", "description": "<ü>"}}]


@functools.cache
def theirs(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama3"}))
def test_families_render_as_in_transformers(tmp_path: Path, family: str, asks: bool):
    folder = build_family_tokenizer(tmp_path, family)
    check(folder, [*CONVERSATIONS, *(WITH_SYSTEM if family != "gemma" else [])], asks=asks)


def test_statements_of_all_kinds_render_as_in_transformers(tmp_path: Path):
    template = """
    {%- macro show(m, n=2) -%}
        {{ m.role | upper }}: {{ (m.content ~ '!') * n }}
    {%- endmacro %}
    {%- set ns = namespace(seen=0, texts=[]) %}
    {%- set all = dict(a=1, **{'b': 2}) %}
    {% for m in messages if m.content %}
      {%- if loop.index is divisibleby 2 %}{% continue %}{% endif %}
      {%- set ns.seen = ns.seen + m.content | length %}
      {% generation %}{{ show(m) }}{% endgeneration %}
      {{ '%s-%03d' % (loop.index0, ns.seen) }} {{ "{:>5}".format(loop.revindex) }} {{ loop.cycle('x', 'y') }}
      {{ m | tojson(indent=2) }} {{ m.content.split()[:2] | join(', ') }} {{ m.content | trim | indent(2) }}
    {% else %}
      none
    {% endfor %}
    {{ all | items | list }} {{ messages | map(attribute='role') | unique | list }} {{ range(3) | sum }}
    {%- for key, value in all | dictsort %} {{ key }}={{ value ** 2 }}{% endfor %}
    {{ tools is defined and tools is none }} {{ eos_token }}{{ bos_token or '-' }}{{ unknown is defined }}
    """
    check(build_tiny_tokenizer(tmp_path, template=template), [*CONVERSATIONS, *WITH_SYSTEM], asks=False)


def test_tools_render_as_in_transformers(tmp_path: Path):
    folder = build_family_tokenizer(tmp_path, "qwen3")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<ü>", "n": [1, None]}}}
    rows: list[dict[str, object]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    check(folder, [rows], asks=True, tools=TOOLS)


def test_prompt_ids_are_those_of_transformers(tmp_path: Path):
    folder = build_family_tokenizer(tmp_path, "qwen3")
    ours = load_chat_tokenizer(folder)
    for rows in CONVERSATIONS:
        text = ours.render(rows, tools=None, add_generation_prompt=True)
        expected = theirs(folder).apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
        assert ours.encode(text) == expected


def check(
    folder: Path,
    conversations: Sequence[list[dict[str, object]]],
    *,
    asks: bool,
    tools: list[object] | None = None,
) -> None:
    ours, other = load_chat_tokenizer(folder), theirs(folder)
    for rows in conversations:
        expected = other.apply_chat_template(rows, tools=tools, add_generation_prompt=asks, tokenize=False)
        assert ours.render(rows, tools=tools, add_generation_prompt=asks) == expected
