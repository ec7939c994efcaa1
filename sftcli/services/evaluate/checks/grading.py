"""Grades the answers of both models, and sets them side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sftcli.services.evaluate.checks.check import AskedRow, Check, behind_thought, no_grades
from sftcli.services.report.check_results import CheckedAnswer, CheckResult, Grade, GradedRow

KEPT_ANSWERS = 12  # of a check, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one model answered, row by row, and which of it had not ended."""

    texts: Sequence[str]
    cut: Sequence[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What each check came to, and every grade by itself."""

    results: tuple[CheckResult, ...]
    rows: tuple[GradedRow, ...]


def check_answers(
    checks: Iterable[Check],
    rows: Sequence[AskedRow],
    base: Answers | None,
    tuned: Answers,
) -> Checked:
    """Grade all answers to ``rows`` by all ``checks``."""
    results, graded = list[CheckResult](), list[GradedRow]()
    for check in checks:
        of_base = None if base is None else grades_of(check, rows, base)
        of_tuned = grades_of(check, rows, tuned)
        summary = check.sum_up(rows, of_base, of_tuned)
        own = [
            GradedRow(row=row.origin, check=check.name, base=first, tuned=second)
            for row, first, second in zip(rows, of_base or no_grades(of_tuned), of_tuned, strict=True)
        ]
        shown = sorted(range(len(rows)), key=lambda index: own[index].tuned.score)[:KEPT_ANSWERS]
        results.append(
            CheckResult(
                name=check.name,
                about=check.about,
                found=check.found,
                measures=summary.measures,
                labels=summary.labels,
                answers=tuple(
                    _shown(own[index], rows[index], _text(base, index), tuned.texts[index]) for index in shown
                ),
            )
        )
        graded += own
    return Checked(results=tuple(results), rows=tuple(graded))


def numbers_of(results: Iterable[CheckResult]) -> dict[str, float]:
    """Return the numbers of the tuned model by name."""
    return {one.name: one.tuned for result in results for one in result.measures if one.tuned is not None}


def grades_of(check: Check, rows: Sequence[AskedRow], answers: Answers) -> list[Grade]:
    """Return what ``check`` says of each answer; one that was cut is wrong."""
    return [
        _cut(grade) if is_cut else grade
        for grade, is_cut in (
            (check.grade(behind_thought(text), row), is_cut)
            for row, text, is_cut in zip(rows, answers.texts, answers.cut, strict=True)
        )
    ]


def _cut(grade: Grade) -> Grade:
    """Return the grade of an answer that had not ended: parts may be right, and the whole is not, as in exact match."""
    return replace(grade, score=0.0, found="")


def _text(answers: Answers | None, index: int) -> str | None:
    return None if answers is None else answers.texts[index]


def _shown(graded: GradedRow, row: AskedRow, base: str | None, tuned: str) -> CheckedAnswer:
    return CheckedAnswer(
        row=graded.row,
        prompt=row.prompt,
        expected=row.expected,
        base=base,
        tuned=tuned,
        base_score=None if graded.base is None else graded.base.score,
        tuned_score=graded.tuned.score,
        wrong=tuple(part for part, score in graded.tuned.parts.items() if score < 1),
    )
