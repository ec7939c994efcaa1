"""JSON files: what is written is read back, and what is damaged is told of."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.errors import DataError, NotFoundError
from sftcli.json_files import read_json, replace_json, write_json

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
OBJECTS = st.dictionaries(
    st.text(st.characters(codec="utf-8")), st.recursive(LEAVES, lambda value: st.lists(value), max_leaves=5)
)


@given(content=OBJECTS)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]):
    folder = tmp_path_factory.mktemp("json")
    for write in (write_json, replace_json):
        write(folder / "x.json", content)
        assert read_json(folder / "x.json") == content


def test_writing_tells_size_and_hash(tmp_path: Path):
    told = write_json(tmp_path / "x.json", {"name": "Ünal"})
    content = (tmp_path / "x.json").read_bytes()
    assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_what_holds_no_object_is_an_error(tmp_path: Path, content: bytes):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(
        DataError, match=r"x\.json (is not valid JSON|holds no JSON object|is empty|is UTF-16)"
    ):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(NotFoundError, match="does not exist") as caught:
        read_json(tmp_path / "x.json", hint="get it again")
    assert caught.value.hint == "get it again"


def test_a_large_file_is_not_read(tmp_path: Path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="1024 MB"):
        read_json(tmp_path / "x.json")


def test_half_a_character_is_damage_and_a_whole_one_is_not(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('{"a": "\\ud83d\\ude00"}', encoding="utf-8")
    assert read_json(path) == {"a": "\N{GRINNING FACE}"}
    for content in (
        b'{"a": ["\\ud83d"]}',
        b'{"\\uDE00": 1}',
        b'{"a": "\xed\xa0\x80"}',
        '{"a": 1}'.encode("utf-16"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.json"):
            read_json(path)
