"""Planted errors of each kind are counted exactly, and by the part that they are in."""

import json
from itertools import pairwise

import pytest

from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.figures import FEW_ROWS
from sftcli.services.evaluate.checks.check import AskedRow
from sftcli.services.evaluate.checks.grading import Answers, check_answers, numbers_of
from sftcli.services.evaluate.checks.number import last_number
from sftcli.services.evaluate.checks.table import find_checks, line_of, read_check_names
from sftcli.services.evaluate.metrics import paired_difference


def asked(expected, **more):
    return [
        AskedRow(origin=f"rows.jsonl:{line}", expected=text, **more) for line, text in enumerate(expected, 1)
    ]


def checked(expected, answers, *, names=("auto",), base=None, cut=None, rows=None):
    rows = rows or asked(expected)
    given = [
        None if texts is None else Answers(texts=texts, cut=cut or [False] * len(rows))
        for texts in (base, answers)
    ]
    return check_answers(find_checks(names, rows), rows, *given)


def orders(count=30):
    return [
        {"city": f"City {number}", "quantity": number, "paid": number % 2 == 0, "tags": ["a", number]}
        for number in range(count)
    ]


def dumped(values):
    return [json.dumps(value) for value in values]


def right_by_name(found):
    (result,) = found.results
    return {one.name: one.tuned_right for one in result.measures}


def test_each_field_is_counted_by_itself():
    want, said = orders(), orders()
    for row in said[:3]:
        row["city"] = "Elsewhere"
    for row in said[2:9]:
        row["quantity"] += 1
    said[10].pop("tags")
    said[11]["more"] = 1  # all fields are right, and the object is not
    texts = [*dumped(said[:29]), "no JSON"]
    found = checked(dumped(want), texts, base=dumped(want))
    assert right_by_name(found) == {
        "fields": 30 - 9 - 3,
        "fields.city": 30 - 3 - 1,
        "fields.quantity": 30 - 7 - 1,
        "fields.paid": 29,
        "fields.tags": 28,
    }
    assert numbers_of(found.results)["fields.quantity"] == pytest.approx(22 / 30)
    shown = found.results[0].answers
    assert [one.tuned_score for one in shown] == sorted(one.tuned_score for one in shown)
    assert shown[2].wrong == ("city", "quantity")


@pytest.mark.parametrize(
    ("said", "is_right"),
    [
        ('{"paid":true,"n":1}', True),
        ('{"n": 1.0, "paid": true}', True),
        ('{"n": "1", "paid": true}', False),
        ('{"n": true, "paid": true}', False),
        ('{"n": 1, "paid": 1}', False),
        ('{"n": 1, "paid": true} and more', False),
        ('```json\n{"n": 1, "paid": true}\n```', False),
        ("[" * 100_000, False),
        ('{"n": NaN, "paid": true}', False),
    ],
)
def test_values_are_compared_as_json(said, is_right):
    found = checked(['{"n": 1, "paid": true}'], [said], names=("fields",))
    assert found.rows[0].tuned.score == is_right


def test_numbers_are_read_without_units_and_separators():
    want = ["#### 1,234", "so it is 72.", "$3.50", "45 %", "-7 °C", "#### 5"]
    said = ["It costs 1234 dollars", "2 times 36 is 72.0!!", "€ 3,50", "45", "It is 7 below", "6 - 1 = 5"]
    assert right_by_name(checked(want, said)) == {"number": 5}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567.5", "1234567.5"),
        ("1.234.567,5", "1234567.5"),
        ("1'234", "1234"),
        ("1_000", "1000"),
        ("1\u202f000 km", "1000"),
        ("3,5", "3.5"),
        ("12,3456", "12.3456"),
        ("\u22122", "-2"),
        ("GPT-4", "4"),
        ("10-15", "15"),
        ("1e3", "1000"),
        (".5", "0.5"),
        ("room 101b", "101"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    found = last_number(text)
    assert (found if found is None else float(found)) == (number if number is None else float(number))


def test_json_asks_for_nothing_but_json():
    want = ['{"a": 1}', '{"b": 1}', "[1]"]
    assert right_by_name(checked(want, ['{"z": 1}', "{'b': 1}", "[]"])) == {"json": 2}


def test_a_pattern_is_looked_for_anywhere():
    names = read_check_names([r"json,regex:^So, \d{1,2}"])
    found = checked(["[1]", "[2]"], ["So, 12", "Well, 12"], names=names)
    assert [[one.name, one.tuned_right] for result in found.results for one in result.measures] == [
        ["json", 0],
        ["regex", 1],
    ]


def test_thinking_is_no_part_of_an_answer():
    want = ["<think>\n9\n</think>\n\n[1]"] * 2
    assert right_by_name(checked(want, ["<think>hm</think>\n[2]", "[3]"])) == {"json": 2}


def test_an_answer_that_had_not_ended_is_wrong_and_its_parts_are_what_they_are():
    found = checked(dumped(orders()), dumped(orders()), cut=[True, *[False] * 29])
    assert right_by_name(found)["fields"] == 29
    assert right_by_name(found)["fields.city"] == 30


def test_the_interval_is_that_of_exact_match():
    want, base = dumped(orders()), dumped(orders())
    for index in range(10):
        base[index] = "no"
    found = checked(want, want, base=base)
    scores = [[row.base.score for row in found.rows], [row.tuned.score for row in found.rows]]
    measure = found.results[0].measures[0]
    assert measure.difference == paired_difference(*scores, [1] * 30)
    assert (measure.base_right, measure.tuned_right, measure.base) == (20, 30, pytest.approx(2 / 3))
    few = checked(want[: FEW_ROWS - 1], want[: FEW_ROWS - 1], base=base[: FEW_ROWS - 1])
    for one in few.results[0].measures:
        assert (one.difference.low, one.difference.high) == (None, None)


def test_every_grade_is_kept_by_row():
    want = dumped(orders(3))
    found = checked(want, [want[0], "no", want[2]], base=["no"] * 3, names=("fields", "json"))
    assert [(one.row, one.check, one.base.score, one.tuned.score) for one in found.rows] == [
        (f"rows.jsonl:{line}", check, 0, score)
        for check, scores in (("fields", (1, 0, 1)), ("json", (1, 0, 1)))
        for line, score in enumerate(scores, 1)
    ]
    assert found.rows[1].tuned.parts == dict.fromkeys(("city", "quantity", "paid", "tags"), 0)


# What is found


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        (
            dumped(orders(4)),
            "check: fields (4 keys) - all 4 expected answers are JSON objects with the same keys",
        ),
        (["yes", "no"] * 10, "check: label (2 labels) - the 20 expected answers are 2 different ones"),
        (["1", "2", "3"] * 9, "check: label (3 labels) - the 27 expected answers are 3 different ones"),
        (["It is 4.", "5 km"], "check: number - all 2 expected answers end in a number"),
        (['{"a": 1}', '{"b": 1}'], "check: json - all 2 expected answers are JSON"),
        (['{"name": "f", "arguments": {}}', "no"], "check: tool - 1 of 2 expected answers call a tool"),
        (["3/4", "1/4"], None),
        (["Paris", "Rome", "yes"], None),
        (["same"] * 40, None),
        (["In 1789 the revolution began in France", "5"], None),
        (["at 3:30", "at 5:30"], None),  # of which the last numbers are but a part
        (["+49 170 1234567", "+49 171 1234567"], None),
        (["1 000 000", "2 000 000"], None),
        (["May 5, 2020", "May 6, 2020"], None),
        (["2*3", "3*5"], None),
        (
            ["3 + 4 = 7 apples.\n#### 7", "48/2 = 24\n24", "**Answer:** 5"],
            "check: number - all 3 expected answers end in a number",
        ),
        (["<think>x</think>", "yes"] * 20, None),
        (["df.sort(by='a')", "df.sort(by='b')"], None),  # code; the tools of a row stand in its prompt
        (["{}", "{}"], "check: json - all 2 expected answers are JSON"),
    ],
)
def test_the_check_that_fits_is_found_and_told_in_one_line(expected, line):
    assert [line_of(check) for check in find_checks(("auto",), asked(expected))] == ([line] if line else [])


@pytest.mark.parametrize(
    ("name", "expected", "why"),
    [
        ("fields", ['{"a": 1}', "text"], "rows.jsonl:2 expects no JSON object"),
        ("fields", ['{"a": 1}', '{"b": 1}'], "rows.jsonl:2 expects an object with other keys"),
        ("number", ["5 km", "none"], "rows.jsonl:2 expects no number"),
        ("label", [f"answer {number}" for number in range(21)], "21 different expected answers"),
        ("label", ["a", "<think>b</think>"], "rows.jsonl:2 expects an empty answer"),
        ("tool", ["a", "b"], "0 of 2 expected answers call a tool"),
    ],
)
def test_a_named_check_that_does_not_fit_says_why(name, expected, why):
    with pytest.raises(DataError, match=why):
        find_checks((name,), asked(expected))


@pytest.mark.parametrize(
    ("texts", "error", "why"),
    [
        (["feilds"], UsageError, "no such check"),
        (["auto,json"], UsageError, "stands alone"),
        (["none", "json"], UsageError, "stands alone"),
        (["json,json"], UsageError, "two checks are called 'json'"),
        (["regex:("], UsageError, "no regular expression"),
        (["nowhere.py:grade"], NotFoundError, "cannot read"),
    ],
)
def test_a_name_that_is_none_is_refused(texts, error, why):
    with pytest.raises(error, match=why):
        read_check_names(texts)


# A function of the user


@pytest.fixture
def grader(tmp_path):
    def write(body):
        path = tmp_path / "mine.py"
        path.write_text(f"def grade(answer, expected, row):\n    {body}\n", encoding="utf-8")
        return (f"{path}:grade",)

    return write


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ("return answer == row['city']", {"grade": 2}),
        ("return len(answer) / 10", {"grade": 0}),
        ("return {'a': True, 'b': answer == expected}", {"grade": 1, "grade.a": 3, "grade.b": 1}),
    ],
)
def test_a_function_grades_with_the_row_of_the_file(grader, body, numbers):
    rows = asked(["Rome", "Oslo", "Bern"], fields={"city": "Rome"})
    assert (
        right_by_name(checked([], ["Rome", "Rome", "Nice"], names=read_check_names(grader(body)), rows=rows))
        == numbers
    )


@pytest.mark.parametrize(
    "body",
    ["return 2", "return 'yes'", "return None", "return {}", "return float('nan')", "raise KeyError('x')"],
)
def test_what_a_function_must_not_do_is_told_with_its_row(grader, body):
    with pytest.raises(DataError, match=r"mine.py:grade (returned|failed on) .*rows.jsonl:1"):
        checked(["a"], ["a"], names=read_check_names(grader(body)))


def test_a_function_is_looked_for_without_running_its_file(grader, tmp_path):
    (name,) = grader("return True")
    with (tmp_path / "mine.py").open("a", encoding="utf-8") as file:
        file.write("raise SystemExit(7)\n")
    assert read_check_names([name]) == (name,)
    with pytest.raises(NotFoundError, match="defines no function 'grads'"):
        read_check_names([name.replace(":grade", ":grads")])


def test_no_part_is_of_more_rows_than_have_it():
    calls = ['{"name": "f", "arguments": {"a": 1}}'] * 3
    found = checked([*calls, "text", "text"], [*calls, "text", calls[0]])
    assert {one.name: (one.tuned_right, one.rows) for one in found.results[0].measures} == {
        "tool": (4, 5),
        "tool.called": (4, 5),
        "tool.name": (3, 3),
        "tool.arguments": (3, 3),
    }
    assert all(first.rows >= second.rows for first, second in pairwise(found.results[0].measures))
