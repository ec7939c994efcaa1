"""Scores side by side: one unit for a number and its difference, and no best where nothing tells it."""

import pytest

from sftcli.services.evaluate.metrics import paired_difference
from sftcli.services.report.comparison import scores_side_by_side
from sftcli.services.report.measures import Compared, compare_scores, differences_of, points_text
from sftcli.services.report.score import Interval

SCORE = {"loss": 0.5, "rows": 120, "answered": 100, "match_fraction": 0.6, "mean_answer_tokens": 9.0}


def side_by_side(*scores: dict[str, float]) -> dict[str, tuple[tuple[str, ...], frozenset[int]]]:
    tables: list[list[Compared]] = [compare_scores(None, score, rows=120) for score in scores]
    return {line.name: (line.values, line.best) for line in scores_side_by_side(tables)}


def test_the_best_score_is_marked_in_the_direction_of_its_measure():
    found = side_by_side(SCORE, SCORE | {"loss": 0.4, "match_fraction": 0.5, "mean_answer_tokens": 8.0})
    assert found["held-out loss (nats/token)"] == (("0.500", "0.400"), frozenset({1}))
    assert found["exact match (%)"] == (("60.0", "50.0"), frozenset({0}))
    assert found["answer length (tokens)"] == (("9.0", "8.0"), frozenset())


@pytest.mark.parametrize(
    "other", [{}, {"loss": 0.5001}, {"loss": 0.4, "rows": 60}], ids=["equal", "as shown", "other rows"]
)
def test_no_score_is_best_where_they_look_alike_or_are_of_other_rows(other):
    assert side_by_side(SCORE, SCORE | other)["held-out loss (nats/token)"][1] == frozenset()


def test_runs_without_a_score_have_none_and_two_of_three_may_be_best():
    found = side_by_side(SCORE, {}, SCORE, SCORE | {"loss": 0.7})
    assert found["held-out loss (nats/token)"] == (("0.500", "-", "0.500", "0.700"), frozenset({0, 2}))


def test_a_difference_has_the_unit_of_its_measure():
    difference = Interval(value=0.592, low=0.5, high=0.675, rows=120)
    assert list(differences_of(None, difference)) == [
        "exact match: +59.2 points against the base, 95% interval +50.0 to +67.5"
    ]


@pytest.mark.parametrize(("value", "text"), [(1.0, "+100.0"), (0.0, "0.0")])
def test_rows_that_all_agree_have_no_interval(value, text):
    found = paired_difference([0.0] * 30, [value] * 30, [1] * 30)
    expected = f"{text} points against no examples, no interval: all 30 rows agree"
    assert points_text(found, other="no examples") == expected


def test_few_rows_have_no_interval():
    (text,) = differences_of(Interval(value=-0.3184, low=None, high=None, rows=3), None)
    assert text == "loss: -0.3 against the base, no interval: 3 rows are too few"
    (text,) = differences_of(None, None, Interval(value=0.0412, low=0.0123, high=0.07, rows=80))
    assert text == "general text: +0.041 nats against the base, 95% interval +0.012 to +0.070"
