from enum import StrEnum

import pytest
from pydantic import BaseModel, Field

from sftcli.config.fields import allowed, leaf_fields, shown, value_from_text


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    count: int = Field(1, ge=1, lt=10)
    share: float = Field(0.5, gt=0, le=1)
    maybe: int | None = Field(None, ge=0)
    name: str = "x"
    color: Color = Color.RED
    many: tuple[str, ...] = ()
    flag: bool = False
    special: str | None = Field(None, json_schema_extra={"allowed": "a word"})


class Outer(BaseModel):
    inner: Inner = Inner()
    own: int = 0


FIELDS = leaf_fields(Outer)


def test_every_key_below_the_sections_is_a_leaf():
    assert list(FIELDS) == [*(f"inner.{name}" for name in Inner.model_fields), "own"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("count", "a whole number, at least 1 and less than 10"),
        ("share", "a number, more than 0 and at most 1"),
        ("maybe", "a whole number, at least 0"),
        ("name", "text that is not empty"),
        ("color", "one of red, blue"),
        ("many", 'a list of texts, such as ["rows.jsonl"]'),
        ("flag", "true or false"),
        ("special", "a word"),
    ],
)
def test_what_a_field_accepts_is_said_in_words(name, words):
    assert allowed(FIELDS[f"inner.{name}"]) == words


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "20", 20),
        ("count", " 20 ", 20),
        ("count", "1_000", 1000),
        ("count", "1e3", 1000.0),
        ("count", "007", 7),
        ("count", "", ""),
        ("count", "many", "many"),
        ("count", "true", True),
        ("count", "5\nown = 1", "5\nown = 1"),
        ("count", "1" * 5000, float("inf")),
        ("share", "1e-4", 1e-4),
        ("share", ".5", 0.5),
        ("maybe", "3", 3),
        ("maybe", "none", None),
        ("name", "2024", "2024"),
        ("name", "none", "none"),
        ("name", '"quoted"', "quoted"),
        ("name", "a = b", "a = b"),
        ("color", "red", "red"),
        ("color", "1", "1"),
        ("many", "rows.jsonl", ["rows.jsonl"]),
        ("many", '"rows.jsonl"', ["rows.jsonl"]),
        ("many", "5", ["5"]),
        ("many", "[]", []),
        ("many", '["a", "b"]', ["a", "b"]),
        ("many", '["a\\/b", "\\ud83d\\ude00"]', ["a/b", "\U0001f600"]),
        ("many", "[a, b]", "[a, b]"),
        ("many", "[" * 100_000 + "]", "[" * 100_000 + "]"),
        ("flag", "true", True),
        ("flag", "yes", "yes"),
    ],
)
def test_text_is_read_as_its_field_needs(name, text, value):
    read = value_from_text(FIELDS[f"inner.{name}"], text)
    assert read == value
    assert type(read) is type(value)


def test_text_for_an_unknown_key_is_read_as_toml():
    assert value_from_text(None, "1e-4") == 1e-4
    assert value_from_text(None, "word") == "word"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        ("a\nb", r"'a\nb'"),
        (Color.RED, "'red'"),
        ({"a": 1}, "a table"),
        ("x" * 100, "'" + "x" * 59 + "..."),
    ],
)
def test_a_wrong_value_is_shown_on_one_short_line(value, text):
    assert shown(value) == text
