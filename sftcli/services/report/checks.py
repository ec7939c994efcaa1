"""What checks found, as ``eval.json`` has it, in the words of screen, page and card."""

from collections.abc import Sequence
from dataclasses import dataclass

from sftcli.figures import NOTHING, change, figure, interval, share_of
from sftcli.services.report.check_results import CheckedAnswer, CheckResult, LabelTable, Measured

_DIGITS = 1  # of a percentage


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownMeasure:
    """A number of a check, in percent, of both models over the same ``rows``."""

    name: str
    base: float | None
    tuned: float
    rows: int
    wrong: int | None  # rows that the tuned model did not get wholly right; None of what is no share of rows
    low: float | None  # of the 95 % interval of the difference; none without a base, and of few rows
    high: float | None

    @property
    def base_text(self) -> str:
        """The base's number for people."""
        return figure(self.base, _DIGITS, self.rows)

    @property
    def tuned_text(self) -> str:
        """The tuned model's number for people."""
        return figure(self.tuned, _DIGITS, self.rows)

    @property
    def bounds(self) -> str:
        """The bounds of the interval, for a column."""
        if self.low is None or self.high is None or self.low == self.high:
            return NOTHING
        return f"{self.low:+.1f} to {self.high:+.1f}"

    @property
    def difference_text(self) -> str:
        """Tuned minus base, for people."""
        return change(None if self.base is None else self.tuned - self.base, _DIGITS, self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownLabels:
    """How the tuned model did at each label: its scores as text, and how often each label was answered."""

    answered: tuple[str, ...]  # names of the columns of counts; the last is of answers that are no label
    rows: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...]  # label, scores, counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCheck:
    """One check: what it is, its numbers, the first of which is that of whole answers, and some answers, wrong ones first."""

    title: str
    found: str
    measures: tuple[ShownMeasure, ...]
    labels: ShownLabels | None
    answers: tuple[CheckedAnswer, ...]

    @property
    def worst(self) -> ShownMeasure | None:
        """The part that is wrong most often; None where no part is."""
        parts = [one for one in self.measures[1:] if one.wrong]
        return max(parts, key=lambda one: one.wrong or 0, default=None)

    @property
    def line(self) -> str:
        """The check in one sentence."""
        whole = self.measures[0]
        text = f"{share_of(whole.rows - (whole.wrong or 0), whole.rows)} answers right"
        if whole.base is not None:
            bounds = interval(whole.low, whole.high, _DIGITS, whole.rows)
            text += f", {whole.difference_text} points against the base, {bounds}"
        if self.worst is not None:
            text += f"; most often wrong: {self.worst.name}, in {self.worst.wrong} of {self.worst.rows}"
        return text


def checks_of(checks: Sequence[CheckResult]) -> list[ShownCheck]:
    """Return ``checks`` as they are shown."""
    return [
        ShownCheck(
            title=f"{check.name} ({check.about})" if check.about else check.name,
            found=check.found,
            measures=tuple(_measure(one, one.tuned) for one in check.measures if one.tuned is not None),
            labels=None if check.labels is None else _labels(check.labels),
            answers=check.answers,
        )
        for check in checks
    ]


def _measure(one: Measured, tuned: float) -> ShownMeasure:
    low, high = (None, None) if one.difference is None else (one.difference.low, one.difference.high)
    return ShownMeasure(
        name=one.name,
        base=None if one.base is None else 100 * one.base,
        tuned=100 * tuned,
        rows=one.rows,
        wrong=None if one.tuned_right is None else one.rows - one.tuned_right,
        low=None if low is None else 100 * low,
        high=None if high is None else 100 * high,
    )


def _labels(table: LabelTable) -> ShownLabels:
    scores = table.tuned
    return ShownLabels(
        answered=(*table.labels, "(no label)"),
        rows=tuple(
            (
                label,
                tuple(
                    figure(100 * shares[index], _DIGITS, table.rows[index])
                    for shares in (scores.precision, scores.recall, scores.f1)
                ),
                scores.confusion[index],
            )
            for index, label in enumerate(table.labels)
        ),
    )
