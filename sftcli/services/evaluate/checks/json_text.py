"""``json``: the answer is JSON, whatever it says."""

from collections.abc import Sequence
from dataclasses import dataclass

from sftcli.services.evaluate.checks.check import NAMED, AskedRow, MeanCheck, behind_thought
from sftcli.services.evaluate.checks.json_values import is_json_text
from sftcli.services.report.check_results import Grade

NAME = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCheck(MeanCheck):
    """Asks for an object or a list in JSON, without a word around it."""

    def grade(self, answer: str, _row: AskedRow, /) -> Grade:
        """Say whether the answer can be parsed."""
        return Grade(score=float(is_json_text(answer)))


def fit_json(rows: Sequence[AskedRow], is_named: bool, /) -> JsonCheck | str:
    """Return the check, or what does not fit; what is named fits any answers, for they are compared with nothing."""
    other = next((row for row in rows if not is_json_text(behind_thought(row.expected))), None)
    if other is None:
        return JsonCheck(name=NAME, found=f"all {len(rows)} expected answers are JSON")
    return JsonCheck(name=NAME, found=NAMED) if is_named else f"{other.origin} expects no JSON object or list"
