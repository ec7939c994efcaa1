"""Which format the rows of a source have, found from many rows and said aloud.

Each row is matched alone, and all must agree: a guess would train on the wrong column.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sftcli.data.conversations.formats import (
    CHAT_COLUMNS,
    COLUMN_SETS,
    LABEL_COLUMNS,
    TURN_KEYS,
    RowFormat,
    common_format,
    find_format,
    known_columns,
    mixed_shapes,
    unknown_shape,
)
from sftcli.data.conversations.keys.dropped_keys import without_keys
from sftcli.data.conversations.keys.meaning import is_false, is_told, is_true
from sftcli.data.conversations.traces import ITEM_KEYS, is_item
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import UsageError
from sftcli.suggest import did_you_mean

DETECTION_ROWS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The format of a source's rows and what was seen when it was found. Its text is what a person wants to hear."""

    format: RowFormat
    columns: tuple[str, ...]  # that are read, in the file's order, by this program's names
    ignored: tuple[str, ...]  # columns, and keys of messages as "messages[].key", that are not read
    first: Origin  # a row of this format
    renames: Mapping[str, str]  # column as this program calls it -> as the file does
    dropped: frozenset[str] = frozenset()  # keys that are taken out of rows and turns before they are read
    labels: frozenset[str] = frozenset()  # columns that tell good answers from bad ones
    classes: frozenset[str] = frozenset()  # columns of such a name that do not

    @property
    def name(self) -> str:
        """What people call the format."""
        return self.format.value

    def __str__(self) -> str:
        text = f"{self.name} rows ({', '.join(self.renames.get(name, name) for name in self.columns)})"
        text += f"; not used: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{text}; dropped on purpose: {', '.join(sorted(self.dropped))}" if self.dropped else text

    def fields(self, record: RawRecord) -> Mapping[str, object]:
        """Return the columns of a row by this program's names, without what is dropped."""
        fields = renamed(record.fields, self.renames)
        return without_keys(fields, self.dropped) if self.dropped else fields


def parse_renames(texts: Iterable[str]) -> dict[str, str]:
    """Return ``prompt=question`` and its like as a mapping from this program's column to the file's.

    Raises:
        UsageError: One has another form, no format reads such a column, or one is given twice.
    """
    known = sorted(frozenset[str]().union(*map(known_columns, RowFormat)))
    renames = dict[str, str]()
    for text in texts:
        ours, _, theirs = text.partition("=")
        if not ours or not theirs:
            raise UsageError(f"{text!r} maps no column", hint="write OURS=THEIRS, such as prompt=question")
        if ours not in known:
            hint = did_you_mean(ours, known) or f"the columns that formats read are {', '.join(known)}"
            raise UsageError(f"{text!r}: no format reads a column {ours!r}", hint=hint)
        if ours in renames or theirs in renames.values():
            raise UsageError(f"{text!r}: one of its columns is mapped already", hint="map each column once")
        renames[ours] = theirs
    return renames


def renamed(fields: Mapping[str, object], renames: Mapping[str, str]) -> Mapping[str, object]:
    """Return ``fields`` under this program's names; a column whose name another one takes is left out."""
    if not renames:
        return fields
    ours = {theirs: name for name, theirs in renames.items()}
    return {
        ours.get(name, name): value for name, value in fields.items() if name in ours or name not in renames
    }


def detect_schema(
    records: Sequence[RawRecord],
    *,
    renames: Mapping[str, str] | None = None,
    dropped: frozenset[str] = frozenset(),
) -> Schema:
    """Return the format that the first `DETECTION_ROWS` of ``records`` have in common; there is at least one.

    A row that has some column of the format and lacks another, or has none at all, does not count: it is rejected when it is converted.

    Raises:
        DataError: The rows have two formats, or none that is known.
        UsageError: ``renames`` names a column that no row has.
    """
    renames = dict(renames or {})
    records = records[:DETECTION_ROWS]
    check_renames(records, renames)
    rows = [(without_keys(renamed(record.fields, renames), dropped), record.origin) for record in records]
    found = [(format_, fields, origin) for fields, origin in rows if (format_ := find_format(fields))]
    if not found:
        raise unknown_shape(*rows[0])
    format_, first_fields, first = found[0]
    for fields, origin in rows:
        common = agreed_format(format_, fields)
        if common is None:
            raise mixed_shapes(format_, first_fields, first, fields, origin)
        format_ = common
    labels, classes = _labels([fields for fields, _ in rows], format_)
    known = known_columns(format_) | labels
    seen = dict.fromkeys(name for fields, _ in rows for name in fields)
    return Schema(
        format=format_,
        columns=tuple(name for name in seen if name in known),
        ignored=(
            *(name for name in seen if name not in known),
            *_ignored_keys(fields for fields, _ in rows),
        ),
        first=first,
        renames=renames,
        dropped=dropped,
        labels=labels,
        classes=classes,
    )


def _labels(
    rows: Sequence[Mapping[str, object]], format_: RowFormat
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the label columns that hold nothing but true and false, and those that hold anything else."""
    if format_ in (RowFormat.TEXT, RowFormat.INSTANCES):  # labels of a text, or of each of several answers
        return frozenset(), frozenset()
    told = {column: [row[column] for row in rows if is_told(row.get(column))] for column in LABEL_COLUMNS}
    labels = {
        column
        for column, values in told.items()
        if values and all(is_true(value) or is_false(value) for value in values)
    }
    return frozenset(labels), frozenset(column for column, values in told.items() if values) - labels


def agreed_format(format_: RowFormat, fields: Mapping[str, object]) -> RowFormat | None:
    """Return the format that reads rows of ``format_`` and this row, or would if it lacked nothing; None for none."""
    found = find_format(fields)
    if found is None:
        return format_ if not fields or COLUMN_SETS[format_].touches(fields) else None
    return common_format(format_, found)


def check_renames(records: Sequence[RawRecord], renames: Mapping[str, str]) -> None:
    """Make sure that some row has each column that is renamed.

    Raises:
        UsageError: None has.
    """
    columns = dict.fromkeys(name for record in records for name in record.fields)
    for theirs in renames.values():
        if theirs not in columns:
            hint = did_you_mean(theirs, columns) or f"the columns are {', '.join(columns)}"
            raise UsageError(f"no row has the column {theirs!r}, which is to be mapped", hint=hint)


def _ignored_keys(rows: Iterable[Mapping[str, object]]) -> Iterable[str]:
    """Return what stands inside messages and is not read, such as a reasoning text."""
    return dict.fromkeys(
        f"{column}[].{key}"
        for fields in rows
        for column in (*CHAT_COLUMNS, "prompt", "completion", "chosen", "input", "output")
        if isinstance(turns := fields.get(column), list)
        for turn in turns
        if isinstance(turn, dict)
        for key, value in turn.items()
        if key not in TURN_KEYS and value is not None and not (key in ITEM_KEYS and is_item(turn))
    )
