"""What a check is, and what it grades."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sftcli.services.evaluate.metrics import paired_difference
from sftcli.services.report.check_results import Grade, LabelTable, Measured

NAMED = "named"  # why a check is there that was not found
_CLOSES_THOUGHT = re.compile(r"</(?:think|thinking|seed:think)>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRow:
    """A held-out row whose answer is graded.

    ``fields`` is the row as its file has it and ``tools`` JSON text of the tools that it lists; both are filled for checks
    with ``needs_rows`` only.
    """

    origin: str
    expected: str
    prompt: str = ""
    fields: Mapping[str, object] = field(default_factory=dict)
    tools: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What all grades come to."""

    measures: tuple[Measured, ...]
    labels: LabelTable | None = None


class Check(Protocol):
    """One check, fitted to the expected answers."""

    @property
    def name(self) -> str:
        """What its numbers are called, as in ``fields.city``."""

    @property
    def about(self) -> str:
        """What was found of these answers in two words, such as ``5 keys``; may be empty."""

    @property
    def found(self) -> str:
        """Why it fits, as a sentence."""

    @property
    def needs_rows(self) -> bool:
        """Whether it looks at more of a row than its expected answer."""

    @property
    def parts(self) -> frozenset[str] | None:
        """Names of the parts that it measures; None where they are not known before an answer is graded."""

    def grade(self, answer: str, row: AskedRow, /) -> Grade:
        """Grade one answer, without its thinking, against its row."""

    def sum_up(
        self, rows: Sequence[AskedRow], base: Sequence[Grade] | None, tuned: Sequence[Grade], /
    ) -> Summary:
        """Return the measures of both models over all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanCheck:
    """What most checks share: their numbers are means of grades."""

    name: str
    about: str = ""
    found: str
    needs_rows: bool = False
    parts: frozenset[str] | None = frozenset()

    def sum_up(
        self, _rows: Sequence[AskedRow], base: Sequence[Grade] | None, tuned: Sequence[Grade], /
    ) -> Summary:
        """Return the mean of all grades, and of each part."""
        return Summary(measures=measures_of(self.name, base, tuned))


def behind_thought(text: str) -> str:
    """Return an answer without the thinking in front of it."""
    closings = list(_CLOSES_THOUGHT.finditer(text))
    return text[closings[-1].end() :].strip() if closings else text.strip()


def no_grades(tuned: Sequence[Grade]) -> list[None]:
    """Return the grades of a base that was not asked."""
    return [None] * len(tuned)


def measures_of(name: str, base: Sequence[Grade] | None, tuned: Sequence[Grade]) -> tuple[Measured, ...]:
    """Return the mean score under ``name``, and that of each part under ``name.part``, over the rows that have it."""
    whole = _measured(
        name, None if base is None else [grade.score for grade in base], [grade.score for grade in tuned]
    )
    return whole, *(
        _of_part(name, part, base, tuned)
        for part in dict.fromkeys(part for grade in tuned for part in grade.parts)
    )


def _of_part(name: str, part: str, base: Sequence[Grade] | None, tuned: Sequence[Grade]) -> Measured:
    pairs = [
        (one.parts[part] if first is None else first.parts[part], one.parts[part])
        for first, one in zip(base or no_grades(tuned), tuned, strict=True)
        if part in one.parts and (first is None or part in first.parts)
    ]
    return _measured(
        f"{name}.{part}",
        None if base is None else [first for first, _ in pairs],
        [second for _, second in pairs],
    )


def _measured(name: str, base: Sequence[float] | None, tuned: Sequence[float]) -> Measured:
    if not tuned:
        return Measured(name=name, rows=0, tuned=None, tuned_right=0)
    difference = None if base is None else paired_difference(base, tuned, [1] * len(tuned))
    return Measured(
        name=name,
        rows=len(tuned),
        base=None if base is None else sum(base) / len(base),
        tuned=sum(tuned) / len(tuned),
        base_right=None if base is None else _right(base),
        tuned_right=_right(tuned),
        difference=difference,
    )


def _right(scores: Sequence[float]) -> int:
    return sum(score == 1 for score in scores)
