"""Scores of rows: a number or an error with its place, and settings that need each other."""

import math

import pytest

from sftcli.config.resolve import parse_set, resolve
from sftcli.data.conversations.messages import Conversation, Message, Rejected, RejectReason
from sftcli.data.conversations.row_reader import with_score
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import DataError, UsageError

ORIGIN = Origin(path="rows.jsonl", line=7)
ROW = Conversation(messages=(Message(role="assistant", content="Yes.", trained=True),), origin=ORIGIN)


def record(**fields) -> RawRecord:
    return RawRecord(fields=fields, origin=ORIGIN)


@pytest.mark.parametrize(("value", "score"), [(3, 3.0), (-0.5, -0.5), ("2.5", 2.5)])
def test_number_of_the_column_is_the_score(value, score):
    assert with_score(ROW, record(grade=value), "grade").score == score


@pytest.mark.parametrize("value", [None, "hard", True, math.nan, math.inf, [1], 10**400])
def test_row_without_a_number_is_an_error_with_its_place(value):
    with pytest.raises(DataError, match=r'rows\.jsonl:7: the score column "grade" holds') as caught:
        with_score(ROW, record(grade=value), "grade")
    assert (caught.value.location.file, caught.value.location.line) == ("rows.jsonl", 7)


def test_column_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(DataError, match='the score column "grade" is not there'):
        with_score(ROW, record(level=1), "grade")


def test_rows_that_are_rejected_and_sources_without_a_score_need_no_number():
    rejected = Rejected(origin=ORIGIN, reason=RejectReason.EMPTY_ANSWER, detail="")
    assert with_score(rejected, record(), "grade") is rejected
    assert with_score(ROW, record(), None) is ROW


@pytest.mark.parametrize("change", ["data.order=score", "data.score_column=grade"])
def test_order_by_score_and_its_column_need_each_other(change):
    with pytest.raises(UsageError, match="each needs the other"):
        resolve(preset=None, config_file=None, overrides=(parse_set(change),), environ={})
