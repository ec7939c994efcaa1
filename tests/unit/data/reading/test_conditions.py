"""Conditions on columns: a closed language, which answers, or says that it cannot."""

from collections import Counter
from typing import Any

import pytest

from sftcli.data.reading.conditions import parse_conditions, wanted_records
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import DataError, UsageError


def kept(rows: list[dict[str, Any]], *texts: str) -> list[int]:
    """Return the numbers of the rows that are wanted; the others were counted."""
    records = [RawRecord(fields=row, origin=Origin(path="r.jsonl", line=n)) for n, row in enumerate(rows)]
    counts = Counter[str]()
    found = list(
        wanted_records(
            records, parse_conditions(texts), name="r.jsonl", left_out=lambda: counts.update(["left"])
        )
    )
    assert counts["left"] == len(rows) - len(found)
    return [record.origin.line for record in found]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("quality>=4", [1, 2]),
        (" quality >= 4 ", [1, 2]),
        ("quality>4", [2]),
        ("quality<4", [0]),
        ("quality<=4.0", [0, 1]),
        ("quality==4", [1]),
        ("quality!=4", [0, 2]),
        ("meta.lang==en", [0, 2]),
        ("meta.lang!='en'", [1]),
        ("meta.tags~math", [0, 1]),
        ("date>=2024-05-01", [1, 2]),
        ("text~a > b", [2]),
        ("ok==true", [0]),
        ("ok!=true", [1]),
        ("a.b==7", [3]),
    ],
)
def test_rows_that_meet_a_condition_are_kept(text, numbers):
    rows: list[dict[str, Any]] = [
        {
            "quality": 3,
            "meta": {"lang": "en", "tags": ["math"]},
            "date": "2023-01-01",
            "ok": True,
            "text": "",
        },
        {"quality": "4", "meta": {"lang": "de", "tags": ["art", "math"]}, "date": "2024-05-01", "ok": False},
        {"quality": 4.5, "meta": {"lang": "en", "tags": []}, "date": "2025-01-01", "text": "a > b"},
        {"quality": None, "a.b": 7},
    ]
    assert kept(rows, text) == numbers


def test_all_conditions_must_hold():
    rows = [{"a": a, "b": b} for a in range(3) for b in range(3)]
    assert kept(rows, "a>=1", "b==2") == [5, 8]


@pytest.mark.parametrize("text", ["quality", "quality=4", ">=4", "", "quality>==4", "a=>b"])
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(UsageError, match="is no condition") as caught:
        parse_conditions([text])
    assert "COLUMN OP VALUE" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("quality>=4", {"quality": "high"}),
        ("quality>=high", {"quality": 4}),
        ("quality>=4", {"quality": [5]}),
        ("quality==4", {"quality": {"score": 4}}),
        ("quality~4", {"quality": 44}),
        ("quality>=4", {"quality": True}),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_place(text, row):
    with pytest.raises(DataError, match=r'r\.jsonl:1: "quality" is .*, which cannot be compared') as caught:
        kept([{"quality": None}, row], text)
    assert caught.value.location.line == 1


def test_column_that_no_row_has_is_refused_with_the_nearest():
    rows = [{"quality": 1, "meta": {"lang": "en"}}]
    with pytest.raises(UsageError, match="no row has the column 'qualty'") as caught:
        kept(rows, "qualty>=4")
    assert "quality" in caught.value.hint
    with pytest.raises(UsageError, match=r"meta\.lnag") as caught:
        kept(rows, "meta.lnag==en")
    assert "meta.lang" in caught.value.hint


def test_no_row_left_is_refused():
    with pytest.raises(DataError, match="no row is left with quality>=4 and quality<5"):
        kept([{"quality": 1}], "quality>=4", "quality<5")
