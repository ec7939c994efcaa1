"""Settings that a rejection names: each was tried, and keeps the row when it is followed."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.messages import Conversation, Rejected
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.modeling.tokenizer.variables import find_switches
from tests.support.chat import answer, conversation, system, user
from tests.support.tiny_tokenizer import CHATML, build_tiny_tokenizer

ASKS = "{% if add_generation_prompt %}"
CONTENT = "message['content']"
# Asks with a thought that is closed already, unless `enable_thinking` opens it; history shows what it is given.
SWITCHED = CHATML.replace(
    "assistant\n' }}",
    "assistant\n' }}{{ '<think>\n' if enable_thinking is defined and enable_thinking else '<think>\n\n</think>\n\n' }}",
)
FORGETFUL = CHATML.replace(CONTENT, f"{CONTENT}.split('</think>')[-1]")  # takes thinking out of every answer
THOUGHT = "<think>\nThree times four.\n</think>\n\n12"


def build(tmp_path: Any, template: str, **variables: Any) -> HFChatTokenizer:
    folder = build_tiny_tokenizer(tmp_path, template=template)
    return load_chat_tokenizer(folder, variables=variables)


def render(tokenizer: HFChatTokenizer, row: Conversation, **options: Any) -> list[Any]:
    return list(Renderer(tokenizer, max_tokens=10_000, **options).render_batch([row]).results)


def advice(found: list[Any]) -> str:
    assert isinstance(found[0], Rejected), found
    return found[0].remedy


def test_a_variable_of_the_template_is_named_with_the_value_that_keeps_the_row(tmp_path):
    row = conversation(user("3 boxes of 4?"), answer(THOUGHT))
    told = advice(render(build(tmp_path, SWITCHED), row))
    assert told == "set a variable of the template: --template-var enable_thinking=true"
    kept = render(build(tmp_path, SWITCHED, enable_thinking=True), row)
    assert not any(isinstance(one, Rejected) for one in kept)


def test_a_variable_that_the_row_sets_itself_is_not_named(tmp_path):
    row = replace(
        conversation(user("3 boxes of 4?"), answer(THOUGHT)), variables=json.dumps({"enable_thinking": False})
    )
    assert "--template-var" not in advice(render(build(tmp_path, SWITCHED), row))


def test_dropping_the_thinking_is_named_where_the_template_has_no_place_for_it(tmp_path):
    tokenizer = build(tmp_path, FORGETFUL)
    row = conversation(user("3 boxes of 4?"), answer(THOUGHT))
    assert advice(render(tokenizer, row)) == "leave the thinking of these rows out: --thinking drop"
    assert not isinstance(render(tokenizer, row, thinking=Thinking.DROP)[0], Rejected)


def test_two_settings_are_named_where_it_takes_both(tmp_path):
    shy = "{% if messages|length == 1 %}{{ raise_exception('ask more') }}{% endif %}" + ASKS
    tokenizer = build(tmp_path, FORGETFUL.replace(ASKS, shy))
    turns = (user("3 boxes of 4?"), answer(THOUGHT), user("And 4?"), answer(THOUGHT))
    told = advice(render(tokenizer, conversation(*turns)))
    assert re.findall(r"--\S+ \S+", told) == ["--thinking drop", "--train-on last"]
    last = conversation(turns[0], replace(turns[1], trained=False), *turns[2:])
    kept = render(tokenizer, last, thinking=Thinking.DROP, train_on=TrainOn.LAST)
    assert not isinstance(kept[0], Rejected)


def test_nothing_is_named_where_the_words_of_a_row_are_at_fault(tmp_path):
    shouts = CHATML.replace(CONTENT, f"{CONTENT}|replace('a', 'A')")
    found = render(build(tmp_path, shouts), conversation(system("Be brief."), user("a cat?"), answer("no")))
    assert advice(found) == ""


@pytest.mark.parametrize("others", [0, 3])
def test_what_is_named_does_not_depend_on_the_rows_before(tmp_path, others):
    tokenizer = build(tmp_path, FORGETFUL)
    rows = [
        conversation(user(f"{n} boxes?"), answer(f"<think>\n{n}\n</think>\n\n{n}")) for n in range(others)
    ]
    row = conversation(user("3 boxes of 4?"), answer(THOUGHT))
    *_, last = Renderer(tokenizer, max_tokens=10_000).render_batch([*rows, row]).results
    assert isinstance(last, Rejected)
    assert "--thinking drop" in last.remedy


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{% if enable_thinking %}a{% endif %}", ("enable_thinking",)),
        ("{{ 'a' if keep is defined and keep else 'b' }}", ("keep",)),
        ("{% set on = on if on is defined else true %}{% if on %}a{% endif %}", ("on",)),
        ("{% if not on is defined %}{% set on = true %}{% endif %}{% if on %}a{% endif %}", ("on",)),
        ("{% set on = messages %}{% if on %}a{% endif %}", ()),
        ("{% for role in messages %}{% if role %}a{% endif %}{% endfor %}", ()),
        ("{% if date %}{{ date }}{% endif %}", ()),
        ("{% if tools %}a{% endif %}{% if add_generation_prompt %}b{% endif %}", ()),
        (
            "{% if b %}1{% endif %}{% if a %}2{% endif %}{% if no_thinking %}3{% endif %}",
            ("no_thinking", "a", "b"),
        ),
    ],
)
def test_switches_are_the_variables_that_decide_and_are_not_printed(source, names):
    assert find_switches(source) == names
