"""How hard a row is, as a column of its source says."""

import math
from dataclasses import replace

from sftcli.data.conversations.messages import Conversation, PlainText, Rejected
from sftcli.data.reading.records import RawRecord
from sftcli.errors import DataError, Location


def with_score(
    row: Conversation | PlainText | Rejected, record: RawRecord, column: str | None
) -> Conversation | PlainText | Rejected:
    """Return ``row`` with the number that ``column`` of its record holds; as it is where there is no column to read.

    Raises:
        DataError: There is no number.
    """
    if column is None or not isinstance(row, Conversation):
        return row
    value = record.fields.get(column)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        found = f"holds {value!r:.40}" if column in record.fields else "is not there"
        raise DataError(
            f'{record.origin}: the score column "{column}" {found}, and a number is needed',
            hint="name another column with data.score_column, or leave data.order as shuffled",
            location=Location(file=record.origin.path, line=record.origin.line),
        )
    return replace(row, score=number)
