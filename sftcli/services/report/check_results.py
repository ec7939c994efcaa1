"""What checks found, as values. ``services/report/checks.py`` reads them back from ``eval.json``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sftcli.services.report.score import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What a check says about one answer: 1 is right, 0 is wrong; a check of the user may give what lies between.

    ``found`` is what was read out of the answer, such as its label or its number; empty where there was none.
    """

    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    found: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedRow:
    """The grades of one held-out row by one check."""

    row: str  # its file and line
    check: str
    base: Grade | None
    tuned: Grade


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number of both models over the same ``rows``; ``*_right`` count the rows that are wholly right in it.

    The name is that of ``--fail-under``.
    """

    name: str
    rows: int
    tuned: float | None  # None where no row has this part
    base: float | None = None
    base_right: int | None = None  # None of a number that is no share of rows
    tuned_right: int | None = None
    difference: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """How one model did at labels, in the order of ``LabelTable.labels``.

    ``confusion`` has a row for each expected label and a column for each answered one; the last column is of answers that are
    none of the labels.
    """

    confusion: tuple[tuple[int, ...], ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTable:
    """The labels, how many rows expect each, and what was answered."""

    labels: tuple[str, ...]
    rows: tuple[int, ...]
    base: LabelScores | None
    tuned: LabelScores


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAnswer:
    """A graded row with its texts, for people."""

    row: str
    prompt: str
    expected: str
    base: str | None
    tuned: str
    base_score: float | None
    tuned_score: float
    wrong: tuple[str, ...]  # parts that the tuned model did not get wholly right


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """All that one check came to; ``answers`` are some of the rows, the wrong ones first."""

    name: str
    about: str
    found: str
    measures: tuple[Measured, ...]
    labels: LabelTable | None
    answers: tuple[CheckedAnswer, ...]
