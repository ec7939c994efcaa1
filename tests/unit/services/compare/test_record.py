"""What is kept of a comparison is numbers of the rows that it names, or it is not read."""

from dataclasses import replace

import pytest

from sftcli.errors import DataError
from sftcli.services.compare.record import FILE, Record, RowScores, read_record, write_record

SCORES = RowScores(
    ids=("a:1", "a:2"), nll=(1.0, 2.0), tokens=(3, 4), num_bytes=(5, 6), train_rows=7, seconds=8.0
)
RECORD = Record(
    identity={"axis": "rows"}, command="sft train", paths={}, trained={}, scored={"one": SCORES}, diverged={}
)


def test_what_is_kept_is_read_as_it_was(tmp_path):
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize("name", ["ids", "nll", "tokens", "num_bytes"])
def test_lists_of_other_lengths_are_damage(tmp_path, name):
    write_record(tmp_path, RECORD)
    path = tmp_path / FILE
    values = [str(value) for value in getattr(SCORES, name)]
    text = path.read_text(encoding="utf-8")
    first = f'"{values[0]}"' if name == "ids" else values[0]
    at = text.index(first, text.index(f'"{name}"'))
    path.write_text(text[:at] + text[at:].replace(first + ",", "", 1), encoding="utf-8")
    with pytest.raises(DataError, match="one number for each row"):
        read_record(tmp_path)


def test_a_row_that_is_named_twice_is_damage():
    with pytest.raises(ValueError, match="one number for each row"):
        replace(SCORES, ids=("a:1", "a:1"))
