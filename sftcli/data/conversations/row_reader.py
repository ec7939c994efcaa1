"""Records of one source to rows, all of which mean what is read of them: else the source is refused, by name.

One row is enough, for what it says is nowhere else. All others are looked at then, and none is handed on, so that the
refusal says how many rows have what, and which is the first of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from sftcli.config.schema.data import FirstTurn, TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import Schema
from sftcli.data.conversations.keys.markup import check_text
from sftcli.data.conversations.keys.meaning import Unread, UnreadError
from sftcli.data.conversations.messages import Conversation, PlainText, Rejected, TokenRow
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import DataError, Location, StoppedError
from sftcli.events import StopFlag


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads records of ``schema``.

    ``score_column`` names the one that says how hard a row is. ``find_control`` returns the first control token of the model
    whose text stands in another text, else nothing; without it, running text may hold any.
    """

    schema: Schema
    train_on: TrainOn
    first_turn: FirstTurn = FirstTurn.REJECT
    score_column: str | None
    find_control: Callable[[str], str] | None
    stop: StopFlag

    def read(self, records: Iterable[RawRecord]) -> Iterator[Conversation | PlainText | TokenRow | Rejected]:
        """Yield the rows of ``records``.

        Raises:
            DataError: A row says something that is not read.
            StoppedError: ``stop`` was set while all that is not read was looked for.
        """
        faults, total = _Faults(), 0
        for total, record in enumerate(records, 1):  # noqa: B007 - the last one is how many there are
            try:
                rows = self._rows(record, self.schema)
            except UnreadError as error:
                faults.add(self._all_unread(record, error), record.origin)
                rows = []
            if not faults:
                yield from rows
            elif self.stop.requested():
                raise StoppedError
        if faults:
            raise faults.error(total)

    def _rows(
        self, record: RawRecord, schema: Schema
    ) -> list[Conversation | PlainText | TokenRow | Rejected]:
        read = frozenset((self.score_column,) if self.score_column else ())
        rows = to_conversations(record, schema, train_on=self.train_on, first_turn=self.first_turn, read=read)
        if self.find_control is not None:
            for row in rows:
                if isinstance(row, PlainText):
                    check_text(row.text, self.find_control)
        return [with_score(row, record, self.score_column) for row in rows]

    def _all_unread(self, record: RawRecord, error: UnreadError) -> list[Unread]:
        """Return what ``error`` found in a row, and what is found in it without that."""
        schema, found = self.schema, list(error.found)
        while keys := {unread.key for unread in error.found if unread.key} - schema.dropped:
            schema = replace(schema, dropped=schema.dropped | keys)
            try:
                self._rows(record, schema)
            except UnreadError as more:
                error = more
                found += more.found
            except DataError:  # without these columns it is of another format
                break
            else:
                break
        return found


class _Faults:
    """What was found that is not read: how many rows have it, and the first of them."""

    def __init__(self) -> None:
        self._found: dict[Unread, tuple[int, Origin]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, found: Iterable[Unread], origin: Origin) -> None:
        for unread in dict.fromkeys(found):
            count, first = self._found.get(unread, (0, origin))
            self._found[unread] = (count + 1, first)

    def error(self, total: int) -> DataError:
        """Return the refusal; ``total`` is the number of rows."""
        parts = [
            f"{first}: {unread.what} ({count} of {total} rows)"
            for unread, (count, first) in self._found.items()
        ]
        _, origin = next(iter(self._found.values()))
        remedies = dict.fromkeys(unread.remedy for unread in self._found)
        flags = list(dict.fromkeys(unread.way_out for unread in self._found))
        return DataError(
            "; ".join(parts),
            hint=f"{'; '.join(remedies)}; or train without the key: {' '.join(flags)}",
            location=Location(file=origin.path, line=origin.line),
        )


def with_score(
    row: Conversation | PlainText | TokenRow | Rejected, record: RawRecord, column: str | None
) -> Conversation | PlainText | TokenRow | Rejected:
    """Return ``row`` with the number that ``column`` of its record holds; as it is where there is no column to read.

    Raises:
        DataError: There is no number.
    """
    if column is None or not isinstance(row, Conversation):
        return row
    value = record.fields.get(column)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # refused below
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        found = f"holds {value!r:.40}" if column in record.fields else "is not there"
        raise DataError(
            f'{record.origin}: the score column "{column}" {found}, and a number is needed',
            hint="name another column with data.score_column, or leave data.order as shuffled",
            location=Location(file=record.origin.path, line=record.origin.line),
        )
    return replace(row, score=number)
