"""Which rows of a source are wanted, said about their columns: ``quality>=4``, ``meta.lang==en``, ``tags~math``.

A closed language: COLUMN OP VALUE. A row that lacks the column, or has null there, is not wanted, whatever is asked of it. A value
that cannot be compared is an error and no answer.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftcli.data.reading.json_rows import json_type
from sftcli.data.reading.record import RawRecord
from sftcli.errors import DataError, Location, UsageError
from sftcli.suggest import did_you_mean

_FORM = re.compile(
    r"\s*(?P<column>[^=!<>~]*[^=!<>~\s])\s*(?P<op>==|!=|<=|>=|<|>|~)\s*(?P<value>[^=].*?|)\s*", re.DOTALL
)
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {  # of two numbers, or of two texts
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Condition:
    """What a column has to hold. Its text is what the user wrote."""

    column: str
    op: str
    value: str

    def __str__(self) -> str:
        return f"{self.column}{self.op}{self.value}"

    def holds(self, record: RawRecord) -> bool:
        """Return whether a row is wanted.

        Raises:
            DataError: What the row has there cannot be compared.
        """
        found = value_at(record.fields, self.column)
        if found is _ABSENT or found is None or found != found:
            return False
        answer = self._asked_of(found)
        if answer is None:
            raise DataError(
                f'{record.origin}: "{self.column}" is {_shown(found)}, which cannot be compared: {self}',
                hint="ask for what the column holds, or fix the row",
                location=Location(file=record.origin.path, line=record.origin.line),
            )
        return answer

    def _asked_of(self, found: object) -> bool | None:
        """Return the answer; None where there is none."""
        if self.op == "~":
            if isinstance(found, str):
                return self.value in found
            if isinstance(found, list):
                return any(_is_same(item, self.value) for item in found)
            return None
        if isinstance(found, list | dict):
            return None
        if self.op in ("==", "!="):
            return _is_same(found, self.value) is (self.op == "==")
        wanted, number = _number(self.value), _number(found)
        if wanted is not None and number is not None:
            return _ORDERS[self.op](number, wanted)
        is_text = wanted is None and number is None and isinstance(found, str)
        return _ORDERS[self.op](found, self.value) if is_text else None


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Return what ``quality>=4`` and its like ask for.

    Raises:
        UsageError: One has another form.
    """
    return tuple(map(_parse, texts))


def _parse(text: str) -> Condition:
    found = _FORM.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text!r} is no condition",
            hint="write COLUMN OP VALUE, such as quality>=4; OP is ==, !=, <, <=, >, >= or ~ (contains)",
        )
    value = found["value"]
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return Condition(found["column"], found["op"], value)


def wanted_records(
    records: Iterable[RawRecord], conditions: Sequence[Condition], *, name: str, left_out: Callable[[], None]
) -> Iterator[RawRecord]:
    """Yield the rows for which all ``conditions`` hold, and call ``left_out`` for each of the others.

    Raises:
        DataError: A value cannot be compared, or no row is left.
        UsageError: No row of the source ``name`` has one of the columns.
    """
    missing = {condition.column for condition in conditions}
    columns, is_empty = dict[str, None](), True
    for record in records:
        if missing:
            columns.update(dict.fromkeys(_names(record.fields)))
            missing -= {column for column in missing if value_at(record.fields, column) is not _ABSENT}
        if all(condition.holds(record) for condition in conditions):
            is_empty = False
            yield record
        else:
            left_out()
    if missing:
        column = min(missing)
        hint = did_you_mean(column, columns) or f"the columns are {', '.join(columns)}"
        raise UsageError(f"{name}: no row has the column {column!r}, which --where asks for", hint=hint)
    if is_empty:
        asked = " and ".join(map(str, conditions))
        raise DataError(f"{name}: no row is left with {asked}", location=Location(file=name))


def value_at(fields: Mapping[str, object], column: str) -> object:
    """Return what a row has in ``column``, or in a key inside of one where the name has dots."""
    if column in fields:
        return fields[column]
    head, dot, rest = column.partition(".")
    inner = fields.get(head)
    return value_at(inner, rest) if dot and isinstance(inner, dict) else _ABSENT


def _names(fields: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def _is_same(found: object, text: str) -> bool:
    if isinstance(found, bool):
        return text.lower() == str(found).lower()
    number, wanted = _number(found), _number(text)
    return found == text or (number is not None and number == wanted)


def _number(value: object) -> float | None:
    """Return a number, also one that is written as text, as CSV has them."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: object) -> str:
    return json_type(value) if isinstance(value, list | dict) else f"{value!r:.40}"
