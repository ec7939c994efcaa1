"""The numbers of labels are those of scikit-learn's report, and of a table made by hand."""

import random

import numpy as np
import pytest

from sftcli.services.evaluate.checks.check import AskedRow
from sftcli.services.evaluate.checks.grading import Answers, check_answers, numbers_of
from sftcli.services.evaluate.checks.table import find_checks


def checked(want, said, base=None):
    rows = [AskedRow(origin=f"rows.jsonl:{line}", expected=text) for line, text in enumerate(want)]
    given = [
        None if texts is None else Answers(texts=texts, cut=[False] * len(rows)) for texts in (base, said)
    ]
    return check_answers(find_checks(("label",), rows), rows, *given)


def test_labels_are_counted_as_by_hand():
    # expected  answered: cat dog none   precision  recall  F1
    # cat  (4)            3   1   0      3/4        3/4     3/4
    # dog  (4)            1   2   1      2/4        2/4     1/2
    # owl  (2)            0   1   1      0          0       0
    want = ["cat"] * 4 + ["dog"] * 4 + ["owl"] * 2
    said = ["cat", "cat", "cat", "dog", "cat", "dog", "dog", "Dog", "dog", "an owl"]
    found = checked(want, said)
    (result,) = found.results
    table = result.labels.tuned
    assert (result.labels.labels, result.labels.rows) == (("cat", "dog", "owl"), (4, 4, 2))
    assert table.confusion == ((3, 1, 0, 0), (1, 2, 0, 1), (0, 1, 0, 1))
    assert table.precision == (0.75, 0.5, 0)
    assert table.recall == (0.75, 0.5, 0)
    assert table.f1 == (0.75, 0.5, 0)
    assert numbers_of(found.results) == {"label": 0.5, "label.macro_f1": pytest.approx(1.25 / 3)}


@pytest.mark.parametrize("seed", range(5))
def test_labels_equal_the_report_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(seed)
    labels = [f"label {number}" for number in range(draw.randint(2, 8))]
    want = [draw.choice(labels) for _ in range(200)]
    said = [text if draw.random() < 0.6 else draw.choice([*labels, "else"]) for text in want]
    result = checked(want, said).results[0]
    theirs = metrics.classification_report(
        want, said, labels=sorted(set(want)), output_dict=True, zero_division=0
    )
    ours = result.labels
    for index, label in enumerate(ours.labels):
        scores = (
            ours.tuned.precision[index],
            ours.tuned.recall[index],
            ours.tuned.f1[index],
            ours.rows[index],
        )
        assert scores == pytest.approx(
            tuple(theirs[label][key] for key in ("precision", "recall", "f1-score", "support"))
        )
    numbers = numbers_of([result])
    assert numbers["label.macro_f1"] == pytest.approx(theirs["macro avg"]["f1-score"])
    assert numbers["label"] == pytest.approx(metrics.accuracy_score(want, said))
    confusion = metrics.confusion_matrix(want, said, labels=list(ours.labels))
    assert np.array(ours.tuned.confusion)[:, :-1].tolist() == confusion.tolist()


def test_the_interval_of_macro_f1_holds_its_difference_and_few_rows_have_none():
    want = ["a", "b"] * 30
    base, said = ["a"] * 60, ["a", "b"] * 25 + ["b", "a"] * 5
    difference = checked(want, said, base).results[0].measures[-1].difference
    assert difference.value == pytest.approx(50 / 60 - 1 / 3)
    assert difference.low < difference.value < difference.high
    same = checked(want, said, said).results[0].measures[-1].difference
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert checked(want[:18], said[:18], base[:18]).results[0].measures[-1].difference.low is None


def test_an_answer_that_had_not_ended_is_no_label():
    rows = [AskedRow(origin=f"rows.jsonl:{line}", expected="ab"[line % 2]) for line in range(6)]
    given = Answers(texts=[row.expected for row in rows], cut=[True, *[False] * 5])
    (result,) = check_answers(find_checks(("auto",), rows), rows, None, given).results
    assert result.labels.tuned.confusion == ((2, 0, 1), (0, 3, 0))
    assert result.measures[0].tuned_right == 5
