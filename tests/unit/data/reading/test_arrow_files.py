"""Arrow files with wrong bytes in them: read as they are, or refused by name; the process goes on."""

import random
import re

import pyarrow as pa
import pytest
from pyarrow import ipc

from sftcli import child
from sftcli.data.reading.table_rows import arrow_rows
from sftcli.errors import DataError

ROWS = 60


@pytest.fixture
def good(tmp_path):
    table = pa.table(
        {
            "question": [f"Is {n} a number?" for n in range(ROWS)],
            "messages": [[{"role": "user", "content": str(n)}, None] for n in range(ROWS)],
        }
    )
    path = tmp_path / "good.arrow"
    with pa.OSFile(str(path), "wb") as file, ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, 20)
    return path


def offsets(content: bytes) -> list[int]:
    """Return where the length of the first text stands."""
    first = len("Is 0 a number?")
    return [found.start() for found in re.finditer(re.escape(first.to_bytes(4, "little")), content)]


def test_a_length_that_leads_out_of_the_file_is_refused(good):
    content = bytearray(good.read_bytes())
    (place, *_) = offsets(bytes(content))
    content[place : place + 4] = (2**31 - 1).to_bytes(4, "little")
    good.write_bytes(content)
    with pytest.raises(DataError, match=r"good.arrow: cannot be read as Arrow: .*[Oo]ffset") as caught:
        list(arrow_rows(good, "good.arrow"))
    assert caught.value.exit_code == 65


def test_a_good_file_is_tried_once(good, monkeypatch):
    assert len(list(arrow_rows(good, "good.arrow"))) == ROWS
    monkeypatch.setattr(child, "_passed", set())
    monkeypatch.setattr(child.subprocess, "Popen", None)
    assert len(list(arrow_rows(good, "good.arrow"))) == ROWS


def test_random_bytes_never_end_the_process(good):
    content, chance = good.read_bytes(), random.Random(5)
    for _ in range(12):
        broken = bytearray(content)
        for _ in range(8):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        good.write_bytes(broken)
        rows = read_or_refused(good)
        assert rows is None or rows <= ROWS


def read_or_refused(path) -> int | None:
    try:
        return len(list(arrow_rows(path, path.name)))
    except DataError:
        return None
