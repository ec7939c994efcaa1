"""The reader and writer of this program's own files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import pytest

from sftcli.errors import DataError, NotFoundError
from sftcli.own_files import FormError, OwnFile, as_form
from sftcli.paths import PathText


class Kind(StrEnum):
    GOOD = "good"


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    pair: tuple[str, int] = ("", 0)

    def __post_init__(self) -> None:
        if self.name == "odd":
            raise ValueError("an odd name")


@dataclass(frozen=True, kw_only=True)
class Whole:
    count: int
    share: float = 0.0
    is_on: bool = False
    note: str | None = None
    kind: Kind = Kind.GOOD
    side: Literal["a", "b"] = "a"
    parts: tuple[Part, ...] = ()
    names: Sequence[str] = ()
    by_name: Mapping[str, Part] = field(default_factory=dict)
    anything: object = None


@dataclass(frozen=True, kw_only=True)
class Place:
    run: PathText
    files: tuple[PathText, ...] = ()


FILE = OwnFile(form=Whole, version=2, hint="make it again")
FULL = Whole(
    count=3,
    share=0.5,
    is_on=True,
    note="é",
    side="b",
    parts=(Part(name="x", pair=("y", 1)),),
    names=("n",),
    by_name={"k": Part(name="z")},
    anything={"a": [1]},
)


@pytest.mark.parametrize("value", [FULL, Whole(count=0)])
def test_what_is_written_is_read(tmp_path, value):
    FILE.write(tmp_path / "file.json", value)
    assert FILE.read(tmp_path / "file.json") == value


def test_a_file_has_the_number_of_its_format_and_nothing_that_is_a_default(tmp_path):
    FILE.write(tmp_path / "file.json", Whole(count=1))
    assert json.loads((tmp_path / "file.json").read_text()) == {"format": 2, "count": 1}


def test_file_without_a_number_is_of_the_first_format_and_other_keys_are_left_out():
    assert FILE.of({"count": 1, "older": 2}, where="it") == Whole(count=1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"count": "3"}, 'count is "3", and not a whole number'),
        ({"count": True}, "count is true, and not a whole number"),
        ({"count": 2**63}, "and not a whole number"),
        ({"count": None}, "count is null, and not a whole number"),
        ({"share": "x"}, 'share is "x", and not a number'),
        ({"share": 10**400}, "share is 1000"),
        ({"is_on": 1}, "is_on is 1, and not true or false"),
        ({"note": 3}, "note is 3, and not text"),
        ({"note": "\ud800"}, "and not text that can be written"),
        ({"kind": "bad"}, 'kind is "bad", and not Kind'),
        ({"side": "c"}, "side is"),
        ({"side": []}, "side is a list"),
        ({"parts": {}}, "parts is an object, and not a list"),
        ({"parts": [{"name": 1}]}, "parts[0].name is 1, and not text"),
        ({"parts": [{}]}, "parts[0].name is missing"),
        ({"parts": [{"name": "x", "pair": ["a"]}]}, "parts[0].pair is a list, and not a list of 2"),
        ({"parts": [{"name": "odd"}]}, "parts[0]: an odd name"),
        ({"names": "abc"}, 'names is "abc", and not a list'),
        ({"by_name": []}, "by_name is a list, and not an object"),
        ({"by_name": {"k": 1}}, "by_name.k is 1, and not an object"),
        ({"by_name": {"\ud800": {"name": "x"}}}, "and not text that can be written"),
        ({"format": 3}, "it has the format 3, and this version reads 2"),
        ({"format": "2"}, 'it has the format "2"'),
        ({"format": True}, "it has the format true"),
        ({"format": 0}, "it has the format 0"),
    ],
)
def test_other_content_is_refused_with_its_place(changed, words):
    with pytest.raises(DataError) as caught:
        FILE.of({"count": 1} | changed, where="it")
    assert words in str(caught.value)
    assert str(caught.value).encode()


def test_a_later_format_asks_for_a_later_version():
    with pytest.raises(DataError) as caught:
        FILE.of({"format": 3}, where="it")
    assert "update" in caught.value.hint


def test_an_older_format_is_refused_where_it_is_not_read():
    with pytest.raises(DataError, match="has the format 1"):
        OwnFile(form=Whole, version=2, oldest=2, hint="").of({"count": 1}, where="it")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"count": "\xff"}', b"[" * 100_000, b'{"count": 1' + b"0" * 5000 + b"}"]
)
def test_content_that_is_none_of_it_names_the_file_and_the_way_out(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        FILE.read(path)
    assert str(path) in caught.value.message
    assert caught.value.hint == "make it again"
    assert FILE.find_whole(path) is None
    with pytest.raises(DataError):
        FILE.find(path)


def test_a_folder_in_its_place_is_damage(tmp_path):
    (tmp_path / "file.json").mkdir()
    with pytest.raises(DataError, match=r"file\.json cannot be read"):
        FILE.read(tmp_path / "file.json")


def test_a_missing_file_is_told_apart_from_a_damaged_one(tmp_path):
    path = tmp_path / "file.json"
    assert FILE.find(path) is None
    assert FILE.find_whole(path) is None
    with pytest.raises(NotFoundError):
        FILE.read(path)


def test_a_plain_object_is_a_form_as_well(tmp_path):
    names = OwnFile(form=dict[str, str], hint="")
    names.write(tmp_path / "file.json", {"a": "b"})
    assert names.read(tmp_path / "file.json") == {"a": "b"}
    with pytest.raises(DataError, match="a is 1, and not text"):
        names.of({"a": 1}, where="it")
    parts = OwnFile(form=dict[str, Part], hint="")
    parts.write(tmp_path / "parts.json", {"a": Part(name="x", pair=("y", 1))})
    assert parts.read(tmp_path / "parts.json") == {"a": Part(name="x", pair=("y", 1))}


def test_a_number_may_be_whole_or_none():
    assert as_form(1, float) == 1.0
    assert isinstance(as_form(1, float), float)
    assert math.isnan(as_form(math.nan, float))
    assert as_form(["a", 1, None], list[str | int | None]) == ["a", 1, None]


def test_a_type_that_is_no_form_is_a_fault_of_the_program():
    with pytest.raises(TypeError):
        as_form(1, set[int])
    with pytest.raises(FormError):
        as_form([], str | int)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"run": "x" * 256}, "run: .* is too long for a path"),
        ({"run": "a\0b"}, "run: .* holds a NUL"),
        ({"run": "a", "files": ["b", "~nosuchuser"]}, r"files\[1\]: .* names the home of an unknown user"),
        ({"run": 3}, "run is 3, and not text"),
    ],
)
def test_text_that_is_used_as_a_path_can_be_one(value, why):
    assert as_form({"run": "a/b", "files": ["~/c"]}, Place) == Place(run="a/b", files=("~/c",))
    with pytest.raises(FormError, match=why):
        as_form(value, Place)
