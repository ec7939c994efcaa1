"""What tells an answer from its neighbors, and what does not."""

import pytest

from sftcli.data.reading.record import Origin
from sftcli.services.evaluate.ledger.repeats import contradictions
from sftcli.services.evaluate.ledger.traits import form_of, odd_traits, script_of
from sftcli.services.report.ledger import Reason


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("plain words", "Latin"), ("обычный text", "Cyrillic"), ("ひらがな漢字", "East Asian"), ("αβγ", "Greek"),
        ("12 + 3", ""), ("", ""), ("مرحبا", "Arabic"),
    ],
)  # fmt: skip
def test_an_alphabet_is_that_of_most_letters(text, script):
    assert script_of(text) == script


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"a": 1}', "JSON"), ("```py\nx\n```", "text with code"), ("<b>a</b>", "text with markup"), ("1 < 2 > 0", "plain text"),
        ("- one\n- two", "a list"), ("1. one\n2. two", "a list"), ("one - two", "plain text"), ("3", "plain text"),
    ],
)  # fmt: skip
def test_a_form_is_told(text, form):
    assert form_of(text) == form


def test_what_many_have_is_not_odd_and_few_rows_have_no_neighbors():
    mixed = ["обычный", "plain"] * 30
    assert odd_traits(["a.jsonl"] * 60, mixed) == [{}] * 60
    assert odd_traits(["a.jsonl"] * 10, ["обычный", *["plain"] * 9]) == [{}] * 10
    assert odd_traits(["a.jsonl"] * 59 + ["b.jsonl"], ["plain"] * 59 + ["обычный"]) == [{}] * 60


def test_answers_without_letters_have_no_alphabet_to_differ_in():
    assert odd_traits(["a.jsonl"] * 30, [str(number) for number in range(30)]) == [{}] * 30


def test_a_row_is_compared_with_its_own_source():
    found = odd_traits(["a.jsonl"] * 50 + ["b.jsonl"] * 50, ["plain"] * 49 + ['{"a": 1}'] * 51)
    assert [row for row, one in enumerate(found) if one] == [49]
    assert found[49] == {Reason.FORMAT: "it is JSON, 98% of its source are plain text"}


def test_the_rarer_of_several_answers_to_one_question_is_listed_and_white_space_does_not_count():
    prompts = ["Capital of Peru?"] * 3 + ["Capital of  peru?", "Capital of Chile?"]
    answers = ["Lima", "Lima", "Cusco", "lima ", "Santiago"]
    origins = [Origin(path="a.jsonl", line=line) for line in range(1, 6)]
    assert contradictions(prompts, answers, origins) == {2: "a.jsonl:1 asks the same and answers otherwise"}
    assert contradictions(prompts[:1] * 2, ["a", "b"], origins[:1] * 2) == {}  # two answers of one row
