"""``regex:PATTERN``: the answer holds what a pattern asks for. Only where it is named."""

import re
from dataclasses import dataclass

from sftcli.errors import UsageError
from sftcli.services.evaluate.checks.check import NAMED, AskedRow, MeanCheck
from sftcli.services.report.check_results import Grade

NAME = "regex"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternCheck(MeanCheck):
    """Looks for ``pattern`` anywhere in the answer, whatever is expected."""

    pattern: re.Pattern[str]

    def grade(self, answer: str, _row: AskedRow, /) -> Grade:
        """Say whether the pattern is found, and what it found."""
        match = self.pattern.search(answer)
        return Grade(score=float(match is not None), found=match[0] if match else "")


def read_pattern(text: str) -> PatternCheck:
    """Return the check of a pattern.

    Raises:
        UsageError: It is no regular expression.
    """
    try:
        return PatternCheck(name=NAME, about=text, found=NAMED, pattern=re.compile(text))
    except re.error as error:
        raise UsageError(
            f"--check regex:{text}: no regular expression: {error}",
            hint="see docs.python.org/3/library/re.html",
        ) from None
