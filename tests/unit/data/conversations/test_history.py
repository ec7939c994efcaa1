"""Earlier turns in a column of their own are read as turns."""

import json
from typing import Any

import pytest

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected
from sftcli.data.reading.record import Origin, RawRecord

PAIRS = [["Which city?", "Istanbul."], ["How large?", "Very."]]
ALPACA = {"instruction": "Shorter, please.", "input": "", "output": "Big.", "system": "Be brief."}


def read(fields: dict[str, Any], train_on: TrainOn = TrainOn.ALL) -> Conversation | Rejected:
    record = RawRecord(fields=fields, origin=Origin(path="rows.jsonl", line=1))
    (made,) = to_conversations(record, detect_schema([record]), train_on=train_on)
    assert isinstance(made, Conversation | Rejected)
    return made


def turns(row: Conversation | Rejected) -> list[tuple[str, str, bool]]:
    assert isinstance(row, Conversation), row
    return [(turn.role, turn.content, turn.trained) for turn in row.messages]


@pytest.mark.parametrize("history", [PAIRS, json.dumps(PAIRS)], ids=["list", "text"])
@pytest.mark.parametrize(
    "row",
    [
        ALPACA,
        {"prompt": "Shorter, please.", "completion": "Big.", "system": "Be brief."},
        {"question": "Shorter, please.", "answer": "Big.", "system_prompt": "Be brief."},
    ],
    ids=lambda row: next(iter(row)),
)
def test_history_is_the_turns_before_the_prompt_and_trained_like_others(row, history):
    assert turns(read(row | {"history": history})) == [
        ("system", "Be brief.", False),
        ("user", "Which city?", False),
        ("assistant", "Istanbul.", True),
        ("user", "How large?", False),
        ("assistant", "Very.", True),
        ("user", "Shorter, please.", False),
        ("assistant", "Big.", True),
    ]


def test_only_the_last_answer_is_trained_where_that_is_asked_for():
    row = read(ALPACA | {"history": PAIRS}, TrainOn.LAST)
    assert [trained for _, _, trained in turns(row)] == [False] * 6 + [True]


@pytest.mark.parametrize("history", [None, [], "[]", "", [[]]], ids=str)
def test_no_history_changes_nothing(history):
    assert turns(read(ALPACA | {"history": history})) == turns(read(ALPACA))


@pytest.mark.parametrize(
    ("history", "why"),
    [
        ([["Which city?"]], 'pair 1 of "history" is a list, expected a list of [user, assistant] pairs'),
        ([["Which city?", None]], 'pair 1 of "history"'),
        ({"user": "Which city?"}, '"history" is an object, expected a list'),
        ("Which city?", '"history" is text that is not JSON'),
        ([["Which city?", " "]], "turn 2: the answer is blank"),
    ],
)
def test_history_of_another_form_is_rejected_by_name(history, why):
    made = read(ALPACA | {"history": history})
    assert isinstance(made, Rejected)
    assert why in made.detail
