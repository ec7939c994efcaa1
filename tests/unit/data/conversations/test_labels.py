"""Rows that say whether their answer is good: the good ones are trained, the bad ones counted, and classes change nothing."""

from typing import Any

import pytest

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.keys.meaning import UnreadError
from sftcli.data.conversations.messages import Conversation, PlainText, Rejected, RejectReason
from sftcli.data.reading.record import Origin, RawRecord

PAIR = {"prompt": "Name a fruit.", "completion": "A pear."}
TURNS = {
    "messages": [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "A pear."}]
}


def read(*rows: dict[str, Any], ignored: frozenset[str] = frozenset()) -> list[str]:
    """Return what became of each row: "kept", or why it was rejected."""
    records = [RawRecord(fields=row, origin=Origin(path="r.jsonl", line=n)) for n, row in enumerate(rows, 1)]
    schema = detect_schema(records, dropped=ignored)
    made = [to_conversations(record, schema, train_on=TrainOn.ALL) for record in records]
    return [_outcome(row) for (row,) in made]


def _outcome(row: Conversation | PlainText | Rejected) -> str:
    return row.reason.value if isinstance(row, Rejected) else "kept"


BAD = RejectReason.LABELED_BAD.value


@pytest.mark.parametrize("row", [PAIR, TURNS], ids=["columns", "turns"])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("good", "bad"), [(True, False), (1, 0), ("true", "false"), ("True", "False"), ("1", "0")]
)
def test_rows_that_are_labeled_as_bad_are_rejected_by_name(row, key, good, bad):
    assert read(row | {key: good}, row | {key: bad}, row | {key: None}, row) == ["kept", BAD, "kept", "kept"]
    assert read(row | {key: bad}, ignored=frozenset({key})) == ["kept"]


@pytest.mark.parametrize(
    "values", [("fruit", "wall"), (0, 1, 2), ("0", "1", "2"), (0.0, 0.5), (False, "maybe")]
)
def test_classes_change_nothing(values):
    assert set(read(*[PAIR | {"label": value} for value in values])) == {"kept"}


def test_label_of_another_kind_behind_the_rows_of_detection_is_refused():
    with pytest.raises(UnreadError, match=r'"label" is not read: .* neither true nor false'):
        read(*[PAIR | {"label": True}] * 300, PAIR | {"label": "fruit"})


def test_labels_of_running_text_are_not_of_an_answer():
    assert read({"text": "Pears are sold by the kilo.", "label": 0}) == ["kept"]
