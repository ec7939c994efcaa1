"""Trees of messages become one conversation each, along the best-ranked replies, or the source is refused by name."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.conversations import trees
from sftcli.data.conversations.trees import joined_trees
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import DataError


def message(own, parent, role, text, **keys):
    return {"message_id": own, "parent_id": parent, "role": role, "text": text, **keys}


ROWS = [
    message("a", None, "prompter", "How do tides work?", lang="en", rank=None),
    message("b", "a", "assistant", "The moon pulls.", rank=1),
    message("c", "a", "assistant", "Moon and sun pull the sea.", rank=0),
    message("d", "c", "prompter", "And at new moon?"),
    message("e", "d", "assistant", "They pull together."),
    message("f", "b", "prompter", "Only the moon?"),
    message("g", None, "prompter", "Hello?"),
    message("h", None, "prompter", "Is fog dry?", lang="en"),
    message("i", "h", "assistant", "Spam.", deleted=True, rank=0),
    message("j", "h", "assistant", "No.", rank=1),
]
TIDES = [
    ("prompter", "How do tides work?"),
    ("assistant", "Moon and sun pull the sea."),
    ("prompter", "And at new moon?"),
    ("assistant", "They pull together."),
]
FOG = [("prompter", "Is fog dry?"), ("assistant", "No.")]


def joined(rows, *, dropped=frozenset(), note=lambda _: None):
    records = [RawRecord(fields=row, origin=Origin(path="t.jsonl", line=n)) for n, row in enumerate(rows, 1)]
    return list(joined_trees(records, name="t.jsonl", dropped=dropped, note=note))


def told(records):
    return [[(turn["role"], turn["content"]) for turn in record.fields["messages"]] for record in records]


def test_one_message_a_row_becomes_one_conversation_a_tree():
    notes = []
    made = joined(ROWS, note=notes.append)
    assert told(made) == [TIDES, FOG]
    assert [record.origin.line for record in made] == [1, 8]
    assert made[0].fields["lang"] == "en"
    assert notes == [
        "t.jsonl: 10 messages in 3 trees: a conversation each, along the best-ranked replies;"
        " left out: 4 messages beside them, 1 trees without an answer"
    ]


@given(st.integers(0, 10_000))
def test_the_order_of_rows_does_not_matter_where_replies_are_ranked(seed):
    shuffled = random.Random(seed).sample(ROWS, len(ROWS))
    assert sorted(told(joined(shuffled))) == sorted([TIDES, FOG])


def nested(own):
    row = next(row for row in ROWS if row["message_id"] == own)
    return {**row, "replies": [nested(each["message_id"]) for each in ROWS if each["parent_id"] == own]}


@pytest.mark.parametrize("wrap", [lambda tree: {"message_tree_id": "a", "prompt": tree}, lambda tree: tree])
def test_nested_replies_become_the_same_conversations(wrap):
    notes = []
    made = joined([wrap(nested(own)) for own in "agh"], note=notes.append)
    assert told(made) == [TIDES, FOG]
    assert [record.origin.line for record in made] == [1, 3]
    assert notes == [
        "t.jsonl: 3 trees: a conversation each, along the best-ranked replies, or the first;"
        " left out: 1 trees without an answer"
    ]


def test_what_a_message_says_beside_its_text_stays_with_its_turn():
    rows = [ROWS[0], ROWS[2] | {"train": 0, "images": []}]
    (made,) = joined(rows)
    assert made.fields["messages"][1] == {
        "role": "assistant",
        "content": "Moon and sun pull the sea.",
        "train": 0,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ROWS[2:],
            "t.jsonl:1: the message 'c' replies to 'a', which is not there (2 of 8 messages)",
        ),
        ([*ROWS, ROWS[3]], "t.jsonl:11: the message 'd' is there twice, first in t.jsonl:4"),
        (
            [message("x", "y", "prompter", "?"), message("y", "x", "assistant", "!")],
            "t.jsonl:1: 2 of 2 messages reply to each other in a circle",
        ),
        ([*ROWS, {"text": "Fog."}], "t.jsonl:11: the row is no message of a tree"),
        ([*ROWS, nested("a")], "t.jsonl:11: the row is a message with replies inside"),
        ([nested("a"), {"text": "Fog."}], "t.jsonl:2: the row holds no tree of messages"),
    ],
)
def test_messages_that_are_not_wholly_there_are_refused_with_the_first_of_them(rows, message):
    with pytest.raises(DataError) as caught:
        joined(rows)
    assert caught.value.message.startswith(message)


def test_more_messages_than_memory_may_hold_are_refused(monkeypatch):
    monkeypatch.setattr(trees, "MAX_CHARS", 50)
    with pytest.raises(DataError, match="are not joined"):
        joined(ROWS)


@pytest.mark.parametrize(
    "row", [{"text": "Fog."}, {"prompt": "Fog?", "completion": "Yes.", "parent_id": "p1"}]
)
def test_other_rows_pass_as_they_are(row):
    assert [record.fields for record in joined([row, row])] == [row, row]


def test_without_parents_there_are_no_trees():
    assert len(joined(ROWS, dropped=frozenset({"parent_id"}))) == len(ROWS)
