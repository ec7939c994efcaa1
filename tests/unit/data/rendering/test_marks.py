"""A mark on a turn or a part, in whatever spelling, means that none of its tokens has loss; all else stays as it is."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.rendering.render import Renderer
from tests.support.chat import family_tokenizer, marked, rendered

MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
ZEROS = (0, 0.0, False, "0", "0.0", "false", "False")
FAMILIES = ["chatml", "llama3", "mistral", "gemma", "qwen3", "metaspace-always", "metaspace-first"]
ASKED = {"role": "user", "content": "2 + 2?"}

marks = st.tuples(st.sampled_from(MARKS), st.sampled_from(ZEROS))
texts = st.text("abcdé \n<|.", min_size=1, max_size=9)


def convert(fields: dict[str, Any]) -> Conversation | Rejected:
    record = RawRecord(fields=fields, origin=Origin(path="rows.jsonl", line=1))
    (made,) = to_conversations(record, detect_schema([record]), train_on=TrainOn.ALL)
    assert isinstance(made, Conversation | Rejected)
    return made


def parts(*pieces: tuple[str, bool], mark: tuple[str, object] = ("weight", 0)) -> dict[str, Any]:
    """Return a row whose answer has these pieces, each with whether it has loss."""
    content = [
        {"type": "text", "text": text} | ({} if has_loss else dict([mark])) for text, has_loss in pieces
    ]
    return {"messages": [ASKED, {"role": "assistant", "content": content}]}


def with_loss(text: str) -> list[str]:
    """Return the stretches of a marked text that have loss."""
    return [piece.partition("⟧")[0] for piece in text.split("⟦")[1:]]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=st.booleans(), pieces=st.lists(texts, min_size=1, max_size=5), mark=marks)
def test_marked_parts_stand_in_the_context_and_have_no_loss(family, first, pieces, mark):
    tokenizer = family_tokenizer(family)
    said = [(text, (number % 2 == 0) == first) for number, text in enumerate(pieces)]
    row, plain = convert(parts(*said, mark=mark)), convert(parts(*((text, True) for text in pieces)))
    if isinstance(plain, Rejected) or not any(text.strip() for text, has_loss in said if has_loss):
        assert isinstance(row, Rejected)
        return
    assert isinstance(row, Conversation)
    whole, cut = (Renderer(tokenizer, max_tokens=9999).render_example(each) for each in (plain, row))
    if isinstance(cut, Rejected):
        return  # refused by name, as where a template strips a whole part
    assert isinstance(whole, Example)
    text = marked(cut, tokenizer)
    assert _plain(text) == _plain(marked(whole, tokenizer))
    ends = [f"{end}⟧" for end in tokenizer.decode_many([[token] for token in sorted(tokenizer.stop_ids)])]
    assert any(end in text for end in ends) == said[-1][1]
    for noise in (*ends, "<think>\n\n</think>"):
        text = text.replace(noise, "⟧" if noise in ends else "")
    assert [piece.strip() for piece in with_loss(text) if piece.strip()] == [
        piece.strip() for piece, has_loss in said if has_loss and piece.strip()
    ]


def _plain(text: str) -> str:
    return text.replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mark=marks, bad=texts.filter(str.strip))
def test_marked_turn_has_no_loss(family, mark, bad):
    tokenizer = family_tokenizer(family)
    turns = [
        ASKED,
        {"role": "assistant", "content": bad} | dict([mark]),
        ASKED,
        {"role": "assistant", "content": "4"},
    ]
    made = Renderer(tokenizer, max_tokens=9999).render_example(convert({"messages": turns}))
    assert isinstance(made, Example)
    (stretch,) = with_loss(marked(made, tokenizer))
    assert stretch.removeprefix("<think>\n\n</think>\n\n").lstrip().startswith("4")


@pytest.mark.parametrize("key", ["text", "value"])
def test_parts_in_the_middle_at_the_start_and_at_the_end(key):
    tokenizer = family_tokenizer("chatml")

    def text_of(*pieces: tuple[str, bool]) -> str:
        row = parts(*pieces)
        for part in row["messages"][1]["content"]:
            part[key] = part.pop("text")
        (example,) = rendered(tokenizer, convert(row))
        return marked(example, tokenizer).partition("assistant\n")[2]

    assert text_of(("Two. ", True), ("Five? ", False), ("Four.", True)) == "⟦Two. ⟧Five? ⟦Four.<|im_end|>⟧\n"
    assert text_of(("Five? ", False), ("Four.", True)) == "Five? ⟦Four.<|im_end|>⟧\n"
    assert text_of(("Four.", True), (" Or five.", False)) == "⟦Four.⟧ Or five.<|im_end|>\n"


def test_turn_whose_parts_have_no_loss_is_not_trained():
    made = convert(parts(("Two.", False), (" ", True), ("Three.", False)))
    assert isinstance(made, Rejected)
    assert made.reason.value == "nothing-trained"


@pytest.mark.parametrize("mode", Thinking)
def test_thinking_in_front_of_parts_is_as_the_settings_say(mode):
    tokenizer = family_tokenizer("qwen3")
    row = parts(("Five? ", False), ("Four.", True))
    row["messages"][1]["reasoning"] = "Two and two."
    (example,) = rendered(tokenizer, convert(row), thinking=mode)
    stretches = with_loss(marked(example, tokenizer))
    assert stretches[-1] == "Four.<|im_end|>"
    assert stretches[:-1] == (["<think>\nTwo and two.\n</think>\n\n"] if mode is Thinking.TRAIN else [])


def test_part_that_reaches_into_thinking_is_rejected_by_name():
    tokenizer = family_tokenizer("qwen3")
    row = convert(parts(("<think>\nTwo", False), (" and two.\n</think>\n\nFour.", True)))
    assert isinstance(row, Conversation)
    made = Renderer(tokenizer, max_tokens=9999).render_example(row)
    assert isinstance(made, Rejected)
    assert "reaches into the thinking" in made.detail


def test_answer_that_is_cut_within_its_context_is_too_long():
    tokenizer = family_tokenizer("chatml")
    row = convert(parts(("word " * 200, False), ("Four.", True)))
    assert isinstance(row, Conversation)
    made = Renderer(tokenizer, max_tokens=60, cuts=True).render_example(row)
    assert isinstance(made, Rejected)
    assert made.reason.value == "too-long"
