"""Answers of two evaluations, row by row: which became right, which wrong, and whether that is more than chance."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sftcli.services.diff.pairing import pairs_by
from sftcli.services.report.evaluation import EVALUATIONS
from sftcli.services.report.score import Answered

EXACT = "exact match"
LEVEL = 0.05  # a smaller p-value is more than chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Answers to the same rows by one measure, before and after. Origins are those of the later evaluation."""

    measure: str
    rows: int  # that both have answered
    became_right: tuple[str, ...]
    became_wrong: tuple[str, ...]
    p_value: float  # of so uneven a change by chance: McNemar's exact test

    @property
    def is_worse(self) -> bool:
        """Whether more answers became wrong than right, by more than chance."""
        return len(self.became_wrong) > len(self.became_right) and self.p_value < LEVEL

    def __str__(self) -> str:
        """Return in a line how many answers changed, and whether by more than chance."""
        sure = "more than chance" if self.p_value < LEVEL else "may be chance"
        changed = f"{len(self.became_right)} became right, {len(self.became_wrong)} wrong"
        return f"{self.measure}: {changed} of {self.rows:,} rows, p = {self.p_value:.2g}, {sure}"

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return asdict(self) | {"is_worse": self.is_worse}


def read_answers(path: Path) -> tuple[Answered, ...] | None:
    """Return the answered rows of ``eval.json``; None where it is of a version that did not keep them.

    Raises:
        NotFoundError, DataError: There is no such file, or it is nothing of that kind.
    """
    return EVALUATIONS.read(path).answers


def moved_answers(before: Sequence[Answered], after: Sequence[Answered]) -> tuple[Moved, ...]:
    """Return what changed of the answers to the rows that both have, by each measure that both have."""
    pairs = list(pairs_by(lambda one: one.row, before, after))
    measures = dict.fromkeys(
        name for first, second in pairs for name in first.passed if name in second.passed
    )
    return tuple(_moved(measure, pairs) for measure in measures)


def mcnemar(became_right: int, became_wrong: int) -> float:
    """Return the p-value of the exact test: how likely so uneven a change is where either way is as likely."""
    changed, fewer = became_right + became_wrong, min(became_right, became_wrong)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << changed))


def _moved(measure: str, pairs: Sequence[tuple[Answered, Answered]]) -> Moved:
    both = [pair for pair in pairs if all(measure in one.passed for one in pair)]
    right, wrong = (
        tuple(
            second.origin
            for first, second in both
            if second.passed[measure] is is_right and first.passed[measure] is not is_right
        )
        for is_right in (True, False)
    )
    return Moved(
        measure=measure,
        rows=len(both),
        became_right=right,
        became_wrong=wrong,
        p_value=mcnemar(len(right), len(wrong)),
    )


def identity_of(prompt: str, expected: str) -> str:
    """Return what tells a row from others: a hash of its prompt and its expected answer."""
    return hashlib.sha256(f"{len(prompt)} {prompt} {expected}".encode("utf-8", "replace")).hexdigest()[:32]
