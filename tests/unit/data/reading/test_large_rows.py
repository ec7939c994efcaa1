"""Rows and headers of out of the way sizes: read in proportion to their size, or refused by name."""

import io
import time

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from sftcli.data.conversations.messages import RowFault
from sftcli.data.conversations.turns import read_turns
from sftcli.data.reading import table_rows
from sftcli.data.reading.table_rows import arrow_rows, csv_rows, parquet_rows
from sftcli.data.reading.text_lines import no_note
from sftcli.errors import DataError

LIMIT = 1 << 20


def wide_csv(names: list[str]) -> io.BufferedReader:
    lines = f"{','.join(names)}\n{','.join('1' for _ in names)}\n"
    return io.BufferedReader(io.BytesIO(lines.encode()))


def test_a_hundred_thousand_columns_take_seconds():
    names = [f"c{number}" for number in range(100_000)]
    began = time.process_time()
    ((_, row),) = csv_rows(wide_csv(names), "wide.csv", no_note, delimiter=",")
    assert len(row) == 100_000
    assert time.process_time() - began < 10


def test_a_name_that_comes_twice_among_many_is_told():
    names = [f"c{number}" for number in range(100_000)]
    with pytest.raises(DataError, match="the header has two columns 'c7'"):
        list(csv_rows(wide_csv([*names, "c7"]), "wide.csv", no_note, delimiter=","))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(("large", "line"), [((5,), 6), ((0, 1, 2), 1)], ids=["one of many", "most"])
def test_a_row_beyond_the_limit_is_refused_by_its_number(kind, large, line, tmp_path, monkeypatch):
    monkeypatch.setattr(table_rows, "MAX_LINE_BYTES", LIMIT)
    count = 3 if len(large) == 3 else 2000
    table = pa.table({"question": ["x" * (2 * LIMIT if row in large else 3) for row in range(count)]})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, use_dictionary=False)
    else:
        with pa.OSFile(str(path), "wb") as file, ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with (
        path.open("rb") as stream,
        pytest.raises(DataError, match=rf"rows.{kind}:{line}: the row has 2 MB; the limit is 1 MB"),
    ):
        list(parquet_rows(stream, path.name) if kind == "parquet" else arrow_rows(path, path.name))


def test_many_rows_that_are_large_together_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(table_rows, "MAX_LINE_BYTES", LIMIT)
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"question": [f"{row:05}" * 1000 for row in range(3000)]}), path)
    with path.open("rb") as stream:
        rows = list(parquet_rows(stream, path.name))
    assert [fields["question"][:5] for _, fields in rows] == [f"{row:05}" for row in range(3000)]


def test_two_hundred_thousand_turns_are_no_row():
    turns = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": str(number)}
        for number in range(200_000)
    ]
    with pytest.raises(RowFault, match="the row has 200000 turns; the limit is 10000"):
        read_turns(turns, "messages")
    assert len(read_turns(turns[:10_000], "messages")) == 10_000
