"""Thinking before an answer, in whatever spelling: trained, kept or dropped as asked, and never absent without a word."""

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason
from sftcli.data.example import Example, RowFlag
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.rendering.encode import encode_prompt
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.chat import answer, conversation, family_tokenizer, marked, rendered, system, user
from tests.support.tiny_tokenizer import CHATML, build_tiny_tokenizer

ASKED = {"role": "user", "content": "2 + 2?"}
THOUGHT, ANSWER = "Two and two.", "Four."


def convert(fields: dict[str, Any]) -> Conversation | Rejected:
    record = RawRecord(fields=fields, origin=Origin(path="rows.jsonl", line=1))
    (made,) = to_conversations(record, detect_schema([record]), train_on=TrainOn.ALL)
    assert isinstance(made, Conversation | Rejected)
    return made


def turn(content: Any = ANSWER, **keys: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": content, **keys}]}


TEXT_PART = {"type": "text", "text": ANSWER}
SPELLINGS = [
    *(
        turn(**{key: THOUGHT})
        for key in ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
    ),
    turn(reasoning_details=[{"type": "reasoning.text", "text": THOUGHT}]),
    turn(thinking_blocks=[{"type": "thinking", "thinking": THOUGHT, "signature": "x"}]),
    turn([{"type": "thinking", "thinking": THOUGHT}, TEXT_PART]),
    turn([{"type": "reasoning", "text": THOUGHT}, TEXT_PART]),
    turn(reasoning=THOUGHT, reasoning_content=f"{THOUGHT}\n"),
    {"prompt": ASKED["content"], "completion": ANSWER, "reasoning": THOUGHT},
    {"question": ASKED["content"], "answer": ANSWER, "thinking": THOUGHT},
    {"instruction": ASKED["content"], "input": "", "output": ANSWER, "reasoning_content": THOUGHT},
]
KEYED = CHATML.replace(
    "message['content'] + '<|im_end|>",
    "('<think>' + message['reasoning'] + '</think>' if message['reasoning'] else '') + message['content'] + '<|im_end|>",
)


@pytest.mark.parametrize("family", ["qwen3", "chatml", "llama3", "mistral"])
def test_all_spellings_give_the_same_ids_and_loss(family: str):
    tokenizer = family_tokenizer(family)
    texts = {marked(*rendered(tokenizer, convert(row)), tokenizer) for row in SPELLINGS}
    assert len(texts) == 1
    (text,) = texts
    assert text.partition("⟦")[2].lstrip().startswith(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<")


def test_thinking_goes_where_the_template_has_a_place_for_it(tmp_path):
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=KEYED))
    (field,) = rendered(tokenizer, convert(turn(thinking=THOUGHT)))
    assert marked(field, tokenizer).endswith(f"⟦<think>{THOUGHT}</think>{ANSWER}<|im_end|>⟧\n")
    (tagged,) = rendered(tokenizer, convert(turn(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")))
    assert tagged.input_ids.tolist() != field.input_ids.tolist()  # a text between tags stays as it is written


def test_where_the_template_has_no_place_for_it_the_audit_says_so():
    (example,) = rendered(family_tokenizer("chatml"), convert(turn(thinking=THOUGHT)))
    assert RowFlag.THOUGHT_WRITTEN in example.flags


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (turn(reasoning="One.", thinking="Another."), "hold different thinking"),
        (turn(thinking_blocks=[{"type": "redacted_thinking", "data": "x"}]), "thinking without a text"),
        (turn([{"type": "thinking", "thinking": "a"}, TEXT_PART], reasoning="b"), "different thinking"),
        (turn([TEXT_PART, {"type": "thinking", "thinking": "a"}]), "stands behind text"),
        (turn("", thinking=THOUGHT), "the answer is empty"),
    ],
)
def test_what_cannot_be_told_is_refused(row: dict[str, Any], why: str):
    made = convert(row)
    assert isinstance(made, Rejected)
    assert why in made.detail


# What is asked for

thoughts = st.text("abc \n<.", min_size=1, max_size=9).filter(str.strip)


@pytest.mark.parametrize("family", ["qwen3", "chatml", "llama3", "mistral", "gemma"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(thought=thoughts, text=st.text("xyz \n|", min_size=1, max_size=9).filter(str.strip))
def test_kept_thinking_has_the_place_of_trained_and_no_loss_and_dropped_none(
    family: str, thought: str, text: str
):
    tokenizer = family_tokenizer(family)
    row = conversation(user("2 + 2?"), answer(text, thinking=thought))
    results = {mode: _one(tokenizer, row, mode) for mode in Thinking}
    if any(isinstance(result, Rejected) for result in results.values()):
        assert all(isinstance(result, Rejected) for result in results.values())
        return
    train, keep, drop = (marked(results[mode], tokenizer) for mode in Thinking)
    assert _plain(train) == _plain(keep)
    assert thought.strip() in _loss(train)
    assert _loss(train).endswith(_loss(keep))
    assert _loss(keep).startswith(text.strip())
    assert _loss(drop) == _loss(keep)
    bare = _one(tokenizer, conversation(user("2 + 2?"), answer(text)), Thinking.DROP)
    assert isinstance(bare, Example)
    assert marked(bare, tokenizer) == drop


def _one(tokenizer: HFChatTokenizer, row: Conversation, mode: Thinking) -> Example | Rejected:
    (result,) = Renderer(tokenizer, max_tokens=9999, thinking=mode).render_batch([row]).results
    return result


def _loss(text: str) -> str:
    (found,) = re.findall("⟦(.*)⟧", text, re.DOTALL)
    return str(found).strip()


def _plain(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


def test_dropped_thinking_leaves_the_templates_empty_form_without_loss():
    tokenizer = family_tokenizer("qwen3")
    row = conversation(user("2 + 2?"), answer(ANSWER, thinking=THOUGHT))
    (example,) = rendered(tokenizer, row, thinking=Thinking.DROP)
    assert marked(example, tokenizer).endswith("<think>\n\n</think>\n\n⟦Four.<|im_end|>⟧\n")
    assert RowFlag.LEAD_TRAINED not in example.flags


@pytest.mark.parametrize("family", ["qwen3", "chatml", "llama3"])
@pytest.mark.parametrize("content", ["<think>\nTwo.\n</think>\n\n", "<think></think>"])
def test_answer_that_holds_nothing_but_thinking_is_rejected(family: str, content: str):
    result = _one(family_tokenizer(family), conversation(user("2 + 2?"), answer(content)), Thinking.TRAIN)
    assert isinstance(result, Rejected)
    assert result.reason is RejectReason.EMPTY_ANSWER


def test_tokens_of_thinking_are_counted():
    tokenizer = family_tokenizer("qwen3")
    row = conversation(user("2 + 2?"), answer(ANSWER, thinking=THOUGHT))
    (trained,) = rendered(tokenizer, row)
    assert 0 < trained.thinking_tokens < trained.loss_mask.sum()
    (kept,) = rendered(tokenizer, row, thinking=Thinking.KEEP)
    assert (kept.thinking_tokens, RowFlag.THINKING in kept.flags) == (0, True)


def test_content_that_closes_a_thought_and_opens_none_is_read_as_the_template_reads_it():
    tokenizer = family_tokenizer("qwen3")
    (example,) = rendered(tokenizer, conversation(user("2 + 2?"), answer(f"{THOUGHT}\n</think>\n\n{ANSWER}")))
    assert marked(example, tokenizer).endswith(f"⟦<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>⟧\n")


# Answers behind the prompt of generation


def asking(text: str) -> str:
    """Return a template whose generation prompt ends in ``text``."""
    return CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n" + text + "' }}")


OPENING, CLOSED = asking("<think>\n"), asking("<think>\n\n</think>\n\n")
LATE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>"
    "{{ messages[0].content + ': ' if loop.last and messages[0].role == 'system' else '' }}{{ m.content }}<|im_end|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "thinking", "ends"),
    [
        (OPENING, "", "assistant\n<think>\n⟦\n</think>\n\nFour.<|im_end|>⟧\n"),
        (OPENING, " Hm.\n", "assistant\n<think>\n⟦Hm.\n</think>\n\nFour.<|im_end|>⟧\n"),
        (CLOSED, "", "assistant\n<think>\n\n</think>\n\n⟦Four.<|im_end|>⟧\n"),
        (LATE_SYSTEM, "", "<|im_start|>Be brief.: 2 + 2?<|im_end|>⟦Four.<|im_end|>⟧"),
    ],
    ids=["opened", "opened and thought", "closed", "system with the last question"],
)
def test_answer_is_trained_behind_the_prompt_that_generation_sees(tmp_path, template, thinking, ends):
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=template))
    history = (system("Be brief."), user("1 + 1?"), answer("Two."), user("2 + 2?"))
    *_, last = rendered(tokenizer, conversation(*history, answer(ANSWER, thinking=thinking)))
    assert marked(last, tokenizer).endswith(ends)
    assert (RowFlag.PROMPT_JOINED in last.flags) == (not thinking)  # with it, the row shows what is asked for
    begin = int(last.loss_mask.argmax())
    assert last.input_ids[:begin].tolist() == encode_prompt(tokenizer, history)


def test_thinking_is_refused_where_the_prompt_closes_it(tmp_path):
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=CLOSED))
    row = conversation(user("2 + 2?"), answer(ANSWER, thinking=THOUGHT))
    result = _one(tokenizer, row, Thinking.TRAIN)
    assert isinstance(result, Rejected)


@pytest.mark.parametrize(
    "family", ["qwen3", "chatml", "llama3", "mistral", "alpaca", "metaspace-always", "metaspace-first"]
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.tuples(thoughts, st.one_of(st.just(""), thoughts), thoughts), min_size=1, max_size=3),
    each=st.sampled_from((TrainOn.ALL, TrainOn.EACH)),
)
def test_prompt_of_every_answer_has_the_ids_that_generation_is_given(family: str, texts: Any, each: TrainOn):
    tokenizer = family_tokenizer(family)
    messages = [
        turn for asked, thought, said in texts for turn in (user(asked), answer(said, thinking=thought))
    ]
    renderer = Renderer(tokenizer, max_tokens=9999, train_on=each)
    results = renderer.render_batch([conversation(*messages)]).results
    if any(isinstance(result, Rejected) for result in results):
        return
    examples = [result for result in results if isinstance(result, Example)]
    assert sum(example.num_trained_turns for example in examples) == len(texts)
    for number in range(len(texts)):
        asked = encode_prompt(tokenizer, messages[: 2 * number + 1])
        example = examples[number if len(examples) > 1 else 0]
        assert example.input_ids[: len(asked)].tolist() == asked
        assert example.loss_mask[len(asked)]
