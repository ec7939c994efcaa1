"""The exact paired test and the pairing of answers."""

import json
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.errors import DataError
from sftcli.services.diff.answers import EXACT, identity_of, mcnemar, moved_answers, read_answers
from sftcli.services.report.evaluation import Evaluation
from sftcli.services.report.score import Answered, Score

counts = st.integers(0, 400)


@given(counts, counts)
def test_p_value_is_that_of_scipy(became_right, became_wrong):
    stats = pytest.importorskip("scipy.stats")
    changed = became_right + became_wrong
    expected = stats.binomtest(became_right, changed, 0.5).pvalue if changed else 1.0
    assert mcnemar(became_right, became_wrong) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("became_right", "became_wrong"), list(product(range(6), range(6))))
def test_p_value_is_the_share_of_outcomes_that_are_as_uneven(became_right, became_wrong):
    changed = became_right + became_wrong
    flips = [sum(sides) for sides in product((0, 1), repeat=changed)]
    uneven = abs(2 * became_right - changed)
    share = Fraction(sum(abs(2 * heads - changed) >= uneven for heads in flips), len(flips))
    assert mcnemar(became_right, became_wrong) == float(share)


def answered_rows(rows, matches) -> tuple[Answered, ...]:
    return tuple(
        Answered(origin=origin, row=identity_of(prompt, expected), passed={EXACT: is_right})
        for (origin, prompt, expected), is_right in zip(rows, matches, strict=True)
    )


def answers_of(rows: dict[str, bool], *, shift: int = 0) -> tuple[Answered, ...]:
    asked = [(f"rows.jsonl:{place + shift}", prompt, "yes") for place, prompt in enumerate(rows, 1)]
    return answered_rows(asked, rows.values())


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_rows_are_paired_by_content_and_named_by_their_later_place(rows):
    before = answers_of({prompt: first for prompt, (first, _) in rows.items()})
    after = answers_of({prompt: second for prompt, (_, second) in rows.items()}, shift=7)
    (moved,) = moved_answers(before[::-1], after)
    assert (moved.measure, moved.rows) == (EXACT, len(rows))
    places = {f"rows.jsonl:{place + 7}": pair for place, pair in enumerate(rows.values(), 1)}
    assert list(moved.became_right) == [name for name, pair in places.items() if pair == (False, True)]
    assert list(moved.became_wrong) == [name for name, pair in places.items() if pair == (True, False)]


def test_only_rows_of_both_count_and_an_edited_answer_makes_another_row():
    before = answered_rows(
        [("a:1", "one", "yes"), ("a:2", "two", "yes"), ("a:3", "three", "yes")], [True] * 3
    )
    after = answered_rows(
        [("a:1", "one", "no"), ("a:3", "three", "yes"), ("a:4", "four", "yes")], [False] * 3
    )
    (moved,) = moved_answers(before, after)
    assert (moved.rows, moved.became_wrong) == (1, ("a:3",))
    assert moved_answers(before, after[2:]) == ()


@pytest.mark.parametrize(
    ("right", "wrong", "is_worse"), [(0, 5, False), (0, 6, True), (6, 0, False), (10, 30, True)]
)
def test_worse_is_more_than_chance(right, wrong, is_worse):
    changes = {f"r{n}": (False, True) for n in range(right)} | {f"w{n}": (True, False) for n in range(wrong)}
    before = answers_of({prompt: first for prompt, (first, _) in changes.items()})
    after = answers_of({prompt: second for prompt, (_, second) in changes.items()})
    assert moved_answers(before, after)[0].is_worse is is_worse


def test_checks_of_both_are_compared_beside_exact_match():
    first = Answered(origin="a:1", row="x", passed={EXACT: False, "json": True, "old": True})
    second = Answered(origin="a:1", row="x", passed={EXACT: True, "json": False, "new": True})
    assert [
        (one.measure, one.became_right, one.became_wrong) for one in moved_answers([first], [second])
    ] == [
        (EXACT, ("a:1",), ()),
        ("json", (), ("a:1",)),
    ]


@pytest.mark.parametrize("passed", [{EXACT: "no"}, {EXACT: 1}, [EXACT], None])
def test_an_answer_is_right_or_wrong_or_damaged(passed, tmp_path):
    path = tmp_path / "eval.json"
    tuned = Score(
        model="m", loss=1.0, response_tokens=1, bits_per_byte=1.0, token_accuracy=1.0, matched=1, answered=1,
        mean_answer_tokens=1.0, mean_expected_tokens=1.0, looping_fraction=0.0,
    )  # fmt: skip
    whole = Evaluation(rows=1, tuned=tuned).to_json()
    answers = [{"origin": "a:1", "row": "x", "passed": passed}]
    path.write_text(json.dumps(whole | {"answers": answers}), encoding="utf-8")
    with pytest.raises(DataError, match=r"eval\.json is damaged: answers\[0\]\.passed"):
        read_answers(path)
