"""``label``: the answer is one of a few."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sftcli.figures import are_few
from sftcli.services.evaluate.checks.check import AskedRow, MeanCheck, Summary, behind_thought, measures_of
from sftcli.services.evaluate.metrics import interval_of, row_draws
from sftcli.services.report.check_results import Grade, LabelScores, LabelTable, Measured
from sftcli.services.report.score import Interval

NAME = "label"
MACRO_F1 = "macro_f1"
MOST_LABELS = 20
_LEAST_ROWS = 3  # of a label, on average: fewer would be answers that happen to be equal
_MOST_CHARS = 80

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCheck(MeanCheck):
    """Compares answers with labels, letter by letter."""

    labels: tuple[str, ...]

    def grade(self, answer: str, row: AskedRow, /) -> Grade:
        """Say whether the label is the right one, and which it is."""
        return Grade(
            score=float(answer == behind_thought(row.expected)), found=answer if answer in self.labels else ""
        )

    def sum_up(
        self, rows: Sequence[AskedRow], base: Sequence[Grade] | None, tuned: Sequence[Grade], /
    ) -> Summary:
        """Return accuracy, macro F1 and the table of labels."""
        wanted = [self.labels.index(behind_thought(row.expected)) for row in rows]
        of_base = None if base is None else self._confusion(wanted, base)
        of_tuned = self._confusion(wanted, tuned)
        before = None if of_base is None else _f1(of_base).mean()
        measure = Measured(
            name=f"{self.name}.{MACRO_F1}",
            rows=len(rows),
            base=None if before is None else float(before),
            tuned=float(_f1(of_tuned).mean()),
            difference=None if base is None else self._f1_difference(wanted, base, tuned),
        )
        return Summary(
            measures=(*measures_of(self.name, base, tuned), measure),
            labels=LabelTable(
                labels=self.labels,
                rows=tuple(int(count) for count in of_tuned.sum(axis=1)),
                base=None if of_base is None else _scores(of_base),
                tuned=_scores(of_tuned),
            ),
        )

    def _answered(self, grades: Sequence[Grade]) -> list[int]:
        """Return the place of the label of each answer; behind all of them for none."""
        return [self.labels.index(grade.found) if grade.found else len(self.labels) for grade in grades]

    def _confusion(self, wanted: Sequence[int], grades: Sequence[Grade]) -> Matrix:
        table = np.zeros((len(self.labels), len(self.labels) + 1))
        np.add.at(table, (wanted, self._answered(grades)), 1)
        return table

    def _f1_difference(
        self, wanted: Sequence[int], base: Sequence[Grade], tuned: Sequence[Grade]
    ) -> Interval:
        """Return how much higher the macro F1 of ``tuned`` is; the rows of its interval are drawn in pairs."""
        once = np.ones((1, len(wanted)))
        value = float((self._drawn_f1(wanted, tuned, once) - self._drawn_f1(wanted, base, once))[0])
        if are_few(len(wanted)):
            return Interval(value=value, low=None, high=None, rows=len(wanted))
        draws = row_draws(len(wanted))
        return interval_of(
            value, self._drawn_f1(wanted, tuned, draws) - self._drawn_f1(wanted, base, draws), len(wanted)
        )

    def _drawn_f1(self, wanted: Sequence[int], grades: Sequence[Grade], draws: Matrix) -> Matrix:
        """Return the macro F1 of each of ``draws``, which say how often each row counts."""
        places = np.arange(len(self.labels))
        is_wanted = np.equal.outer(wanted, places)
        is_answered = np.equal.outer(self._answered(grades), places)
        f1 = _f1_of(draws @ (is_wanted & is_answered), draws @ is_wanted, draws @ is_answered)
        return np.asarray(f1.mean(axis=1), dtype=np.float64)


def fit_label(rows: Sequence[AskedRow], is_named: bool, /) -> LabelCheck | str:
    """Return the check, or what does not fit; what is named may have labels that come once."""
    counts = Counter(behind_thought(row.expected) for row in rows)
    if "" in counts:  # which stands for no label in a grade
        empty = next(row for row in rows if not behind_thought(row.expected))
        return f"{empty.origin} expects an empty answer"
    if len(counts) > MOST_LABELS:
        return f"there are {len(counts)} different expected answers, and at most {MOST_LABELS} are labels"
    if not is_named and (len(counts) < 2 or len(rows) < _LEAST_ROWS * len(counts)):
        return f"{len(rows)} rows have {len(counts)} different expected answers"
    if not is_named and (
        long := next((text for text in counts if len(text) > _MOST_CHARS or "\n" in text), "")
    ):
        return f"an expected answer of {len(long)} characters is no label"
    labels = tuple(sorted(counts))
    return LabelCheck(
        name=NAME,
        about=f"{len(labels)} {'label' if len(labels) == 1 else 'labels'}",
        found=f"the {len(rows)} expected answers are {len(labels)} different ones",
        parts=frozenset({MACRO_F1}),
        labels=labels,
    )


def _scores(confusion: Matrix) -> LabelScores:
    right, wanted, answered = _counts(confusion)
    return LabelScores(
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        precision=tuple(_ratio(right, answered).tolist()),
        recall=tuple(_ratio(right, wanted).tolist()),
        f1=tuple(_f1(confusion).tolist()),
    )


def _counts(confusion: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    return np.diagonal(confusion), confusion.sum(axis=1), confusion[:, :-1].sum(axis=0)


def _f1(confusion: Matrix) -> Matrix:
    return _f1_of(*_counts(confusion))


def _f1_of(right: Matrix, wanted: Matrix, answered: Matrix) -> Matrix:
    return _ratio(2 * right, wanted + answered)


def _ratio(part: Matrix, whole: Matrix) -> Matrix:
    """Return ``part / whole``, and 0 where there is nothing to divide by."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)
