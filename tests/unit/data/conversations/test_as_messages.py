"""What is written as messages is read back as it is: a law, for conversations of every kind."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.as_messages import messages_line
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Message, PlainText
from sftcli.data.reading.record import RawRecord
from tests.support.chat import ORIGIN, answer, conversation, user

ASKED = {"role": "user", "content": "2 + 2?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{ "a": 2 }'}}
ROWS = [
    {"prompt": "2 + 2?", "completion": " Four.\n"},
    {"instruction": "And?", "output": "Five.", "system": "Be brief.", "history": [["2 + 2?", "Four."]]},
    {"prompt": "2 + 2?", "completion": "Four.", "reasoning": "Two and two."},
    {"messages": [ASKED, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFour."}]},
    {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "5", "train": "false"},
            ASKED,
            {"role": "assistant", "content": "4"},
        ]
    },
    {
        "messages": [
            ASKED,
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Five? ", "loss": 0}, {"type": "text", "text": "Four."}],
            },
        ]
    },
    {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL | {"id": "c2"}]},
            {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"},
            {"role": "assistant", "content": "Four.", "thinking": "It says 4."},
        ],
        "tools": [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"text": "Pears are sold by the kilo.\n"},
]


def read(line: str) -> Conversation | PlainText:
    record = RawRecord(fields=json.loads(line), origin=ORIGIN)
    (made,) = to_conversations(record, detect_schema([record]), train_on=TrainOn.ALL)
    assert isinstance(made, Conversation | PlainText)
    return made


@pytest.mark.parametrize("fields", ROWS, ids=lambda fields: ", ".join(fields))
def test_rows_of_every_kind_come_back_as_they_are(fields):
    row = read(json.dumps(fields))
    line = messages_line(row)
    assert line
    assert read(line) == row
    assert messages_line(read(line)) == line


texts = st.text(min_size=1, max_size=9).filter(str.strip)


@given(st.lists(st.tuples(texts, texts, st.booleans(), st.just("") | texts), min_size=1, max_size=4))
def test_any_texts_come_back_as_they_are_or_are_refused(pairs):
    turns = list[Message]()
    for asked, said, trained, thinking in pairs:
        turns += [user(asked), answer(said, trained=trained, thinking=thinking)]
    row = conversation(*turns)
    line = messages_line(row)
    assert bool(line) or not any(turn.trained for turn in turns) or any(turn.thinking for turn in turns)
    if line:
        assert read(line) == row


def test_row_that_would_be_read_otherwise_has_no_line():
    calls = json.dumps([{"type": "function", "function": {"name": "f", "arguments": {}}}])
    called = answer("", trained=False, tool_calls=calls)
    row = conversation(user("Go."), called, called, answer("Done."))  # neighbors that are read as one turn
    assert messages_line(row) == ""
