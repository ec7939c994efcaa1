"""``number``: the last number of the answer is that of the expected one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from sftcli.services.evaluate.checks.check import AskedRow, MeanCheck, behind_thought
from sftcli.services.report.check_results import Grade

NAME = "number"
_SEPARATORS = ",'\u2019_\u00a0\u202f"  # of thousands: a plain space also stands between two numbers
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w.)\]])[-+\u2212])?
    (?:
        (?P<groups>[0-9]{{1,3}}(?:[{_SEPARATORS}][0-9]{{3}})+)(?![0-9])(?P<rest>\.[0-9]+)?
      | (?P<dotted>[0-9]{{1,3}}(?:\.[0-9]{{3}}){{2,}})(?![0-9])(?P<comma_rest>,[0-9]+)?
      | (?P<plain>[0-9]+(?:[.,][0-9]+)?|\.[0-9]+)
    )
    (?P<exponent>[eE][-+]?[0-9]{{1,3}}(?![0-9]))?
    """,
    re.VERBOSE,
)
# What may stand before the last number: a currency, a mark or a space, but no other digits that belong to it, as of a time,
# a date, a telephone number or a product. Behind it there may be a unit.
_LEAD = re.compile(r"(?:\A|\n[^\S\n]*|(?<!\d)[$€£¥₹#*:=(~≈\"'\[{]|(?<![\d\s])(?<!\d[,;])[^\S\n]+)\Z")
_MOST_UNIT_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberCheck(MeanCheck):
    """Compares the last numbers as numbers."""

    def grade(self, answer: str, row: AskedRow, /) -> Grade:
        """Say whether the last number is the right one."""
        said, want = last_number(answer), last_number(behind_thought(row.expected))
        return Grade(score=float(said is not None and said == want), found="" if said is None else str(said))


def fit_number(rows: Sequence[AskedRow], is_named: bool, /) -> NumberCheck | str:
    """Return the check, or what does not fit; where it is named a number may stand anywhere."""
    does_fit = _has_number if is_named else _ends_in_number
    other = next((row for row in rows if not does_fit(behind_thought(row.expected))), None)
    if other is not None:
        return f"{other.origin} expects no {'number' if is_named else 'answer that ends in a number'}"
    return NumberCheck(
        name=NAME, found=f"all {len(rows)} expected answers {'hold' if is_named else 'end in'} a number"
    )


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, without separators of thousands, unit and currency.

    ``3,5`` is three and a half, and ``3,500`` three and a half thousand.
    """
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    whole = re.sub(rf"[.{_SEPARATORS}]", "", found["groups"] or found["dotted"] or "")
    rest = found["rest"] or (found["comma_rest"] or "").replace(",", ".")
    digits = whole + rest if whole else found["plain"].replace(",", ".")
    value = Decimal(digits + (found["exponent"] or ""))
    return -value if found["sign"] in ("-", "\u2212") else value


def _has_number(text: str) -> bool:
    return _NUMBER.search(text) is not None


def _ends_in_number(text: str) -> bool:
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return False
    before, behind = text[: numbers[-1].start()], text[numbers[-1].end() :]
    return bool(_LEAD.search(before)) and len(behind) <= _MOST_UNIT_CHARS and "\n" not in behind
