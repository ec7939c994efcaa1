"""Which format the rows of a source have, found from the columns of many rows.

Each row is matched alone; all must agree. A file whose rows do not agree, or agree on nothing known, is an error that
shows both shapes or the nearest known one: a guess would train on the wrong column.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from sftcli.data.jsonrows import json_type
from sftcli.data.records import Origin, RawRecord
from sftcli.errors import DataError, Location, UsageError, did_you_mean

DETECTION_ROWS = 200
CHAT_COLUMNS = ("messages", "conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
PROMPT_COLUMNS = ("prompt", "question", "instruction", *CHAT_COLUMNS)
TOOL_COLUMNS = ("tools", "functions")
MESSAGE_KEYS = {
    "messages": {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "weight"},
    "sharegpt": {"from", "value", "weight"},
}


class Format(StrEnum):
    """The formats that are read without being named."""

    PREFERENCE = "preference"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    INSTANCES = "nested instances"
    DOLLY = "dolly"
    ALPACA = "alpaca"
    OPENORCA = "openorca"
    PROMPT_COMPLETION = "prompt/completion"
    PROMPT_RESPONSE = "prompt/response"
    QUESTION_ANSWER = "question/answer"
    INPUT_OUTPUT = "input/output"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The columns of a format. ``needed`` holds alternatives: one of each must be there."""

    format: Format
    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()

    def matches(self, fields: Mapping[str, object]) -> bool:
        """Whether a row with ``fields`` has this shape."""
        return all(any(name in fields for name in names) for names in self.needed)

    @property
    def known(self) -> tuple[str, ...]:
        """All columns that this format reads."""
        return (*(name for names in self.needed for name in names), *self.optional)


_ANSWER = ("output", "response")

# The first that matches is the format: columns that are read by none of the others decide before common ones.
SHAPES = (
    Shape(
        format=Format.PREFERENCE,
        needed=(("chosen",),),
        optional=(*PROMPT_COLUMNS, "rejected", *SYSTEM_COLUMNS, *TOOL_COLUMNS),
    ),
    Shape(format=Format.MESSAGES, needed=(CHAT_COLUMNS,), optional=(*SYSTEM_COLUMNS, *TOOL_COLUMNS)),
    Shape(format=Format.SHAREGPT, needed=(CHAT_COLUMNS,), optional=(*SYSTEM_COLUMNS, *TOOL_COLUMNS)),
    Shape(
        format=Format.INSTANCES, needed=(("instruction",), ("instances",)), optional=SYSTEM_COLUMNS
    ),
    Shape(
        format=Format.DOLLY,
        needed=(("instruction",), ("context",), ("response",)),
        optional=SYSTEM_COLUMNS,
    ),
    Shape(
        format=Format.ALPACA, needed=(("instruction",), _ANSWER), optional=("input", *SYSTEM_COLUMNS)
    ),
    Shape(format=Format.OPENORCA, needed=(("question",), ("response",)), optional=SYSTEM_COLUMNS),
    Shape(
        format=Format.PROMPT_COMPLETION,
        needed=(("prompt",), ("completion",)),
        optional=(*SYSTEM_COLUMNS, *TOOL_COLUMNS),
    ),
    Shape(
        format=Format.PROMPT_RESPONSE,
        needed=(("prompt",), ("response",)),
        optional=(*SYSTEM_COLUMNS, *TOOL_COLUMNS),
    ),
    Shape(format=Format.QUESTION_ANSWER, needed=(("question",), ("answer",)), optional=SYSTEM_COLUMNS),
    Shape(format=Format.INPUT_OUTPUT, needed=(("input",), ("output",)), optional=SYSTEM_COLUMNS),
    Shape(format=Format.TEXT, needed=(("text",),)),
)
_BY_FORMAT = {shape.format: shape for shape in SHAPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The format of a source's rows, and what was seen when it was found. As text it is what a person wants to hear."""

    format: Format
    columns: tuple[str, ...]  # read, in the order of the first row
    ignored: tuple[str, ...] = ()  # columns and keys of messages that are not read
    first: Origin  # of the row that it was found from
    renames: Mapping[str, str]  # column as this program calls it -> column in the file

    @property
    def name(self) -> str:
        """What people call the format."""
        return self.format.value

    def __str__(self) -> str:
        told = f"{self.name} rows ({', '.join(self.columns)})"
        return f"{told}; not used: {', '.join(self.ignored)}" if self.ignored else told


def parse_renames(texts: Iterable[str]) -> dict[str, str]:
    """Return ``prompt=question`` and its like as a mapping from our column to the file's.

    Raises:
        UsageError: One has another form, or a column is given twice.
    """
    renames = dict[str, str]()
    for text in texts:
        ours, sign, theirs = text.partition("=")
        if not sign or not ours or not theirs:
            raise UsageError(f"{text!r} maps no column", hint="write OURS=THEIRS, such as prompt=question")
        known = sorted({name for shape in SHAPES for name in shape.known})
        if ours not in known:
            hint = did_you_mean(ours, known) or f"known columns are {', '.join(known)}"
            raise UsageError(f"{text!r}: no format has a column {ours!r}", hint=hint)
        if ours in renames:
            raise UsageError(f"two columns are mapped to {ours!r}: {renames[ours]!r} and {theirs!r}")
        renames[ours] = theirs
    return renames


def renamed(fields: Mapping[str, object], renames: Mapping[str, str]) -> Mapping[str, object]:
    """Return ``fields`` under the names of ``renames``; a column that gives its place to another is left out."""
    if not renames:
        return fields
    theirs = {theirs: ours for ours, theirs in renames.items() if theirs in fields}
    return {theirs.get(name, name): value for name, value in fields.items() if name in theirs or name not in renames}


def detect_schema(records: Sequence[RawRecord], *, renames: Mapping[str, str] | None = None) -> Schema:
    """Return the format that the first `DETECTION_ROWS` of ``records`` have in common.

    Raises:
        DataError: The rows have two formats, or none that is known.
        UsageError: ``renames`` names a column that no row has.
    """
    renames = renames or {}
    records = records[:DETECTION_ROWS]
    for theirs in renames.values():
        found = {name for record in records for name in record.fields}
        if theirs not in found:
            hint = did_you_mean(theirs, found) or f"the columns are {', '.join(sorted(found))}"
            raise UsageError(f"no row has a column {theirs!r}, which is to be mapped", hint=hint)
    rows = [(renamed(record.fields, renames), record.origin) for record in records]
    (first, origin), format_ = rows[0], row_format_of(*rows[0])
    for fields, other in islice(rows, 1, None):
        found_format = row_format_of(fields, other)
        if found_format is format_ or _is_alpaca_family(found_format, format_):
            # Dolly rows without a context are Alpaca rows; Dolly reads both.
            format_ = Format.DOLLY if found_format is not format_ else format_
            continue
        raise mixed_shapes(format_, first, origin, found_format, fields, other)
    seen = dict.fromkeys(name for fields, _ in rows for name in fields)
    known = _known_columns(format_)
    return Schema(
        format=format_,
        columns=tuple(name for name in seen if name in known),
        ignored=(*(name for name in seen if name not in known), *_ignored_keys(rows, format_)),
        first=origin,
        renames=renames,
    )


def _is_alpaca_family(one: Format, other: Format) -> bool:
    return {one, other} == {Format.ALPACA, Format.DOLLY}


def _known_columns(format_: Format) -> tuple[str, ...]:
    extra = _BY_FORMAT[Format.ALPACA].known if format_ is Format.DOLLY else ()
    return (*_BY_FORMAT[format_].known, *extra)


def _ignored_keys(rows: Iterable[tuple[Mapping[str, object], Origin]], format_: Format) -> list[str]:
    """Return the keys inside messages that are not read, such as a reasoning text, as ``messages[].key``."""
    known = MESSAGE_KEYS.get(format_.value, set())
    keys = dict.fromkeys(
        f"{column}[].{key}"
        for fields, _ in rows
        for column in CHAT_COLUMNS
        if known and isinstance(turns := fields.get(column), list)
        for turn in turns
        if isinstance(turn, dict)
        for key, value in turn.items()
        if key not in known and value is not None
    )
    return list(keys)


def row_format_of(fields: Mapping[str, object], origin: Origin) -> Format:
    """Return the format of one row.

    Raises:
        DataError: It has none of the known shapes.
    """
    for shape in SHAPES:
        if shape.matches(fields):
            if shape.format is Format.MESSAGES and _speaks_sharegpt(fields):
                return Format.SHAREGPT
            return shape.format
    raise unknown_shape(fields, origin)


def _speaks_sharegpt(fields: Mapping[str, object]) -> bool:
    turns = next((fields[column] for column in CHAT_COLUMNS if column in fields), None)
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        return "from" in turns[0]
    return isinstance(turns, str) and '"from"' in turns


def mixed_shapes(
    format_: Format,
    first: Mapping[str, object] | None,
    origin: Origin,
    other_format: Format,
    other: Mapping[str, object],
    other_origin: Origin,
) -> DataError:
    """Return the error for rows of two formats, with the place of each."""
    columns = f" ({', '.join(first)})" if first else ""
    return DataError(
        f"the rows have two formats: {origin} is {format_}{columns}, {other_origin} is {other_format}"
        f" ({', '.join(other)})",
        hint="put rows of different formats into files of their own",
        location=Location(file=other_origin.path, line=other_origin.line),
    )


def unknown_shape(fields: Mapping[str, object], origin: Origin) -> DataError:
    """Return the error for a row of no known format: its columns, the nearest format, and how to map them."""
    columns = ", ".join(repr(name) for name in fields) or "none"
    near = {shape.format: _nearest_columns(shape, fields) for shape in SHAPES}
    format_, pairs = max(near.items(), key=lambda item: _score(item[0], item[1]))
    if pairs:
        maps = " ".join(
            f"--map {ours}={_shell(theirs)}" for ours, theirs in pairs.items() if ours != theirs
        )
        missing = [
            "/".join(names) for names in _BY_FORMAT[format_].needed if not any(name in pairs for name in names)
        ]
        lacks = f", which also needs {' and '.join(missing)}" if missing else ""
        hint = f"nearest is {format_}{lacks}; map its columns: {maps or f'--map {missing[0]}=COLUMN'}"
    else:
        hint = "map columns to those of a known format: --map prompt=COLUMN --map response=COLUMN"
    if nested := [name for name, value in fields.items() if _is_list_of_rows(value)]:
        hint = f"the rows seem to be inside {nested[0]!r}: jq -c '.{nested[0]}[]' {origin.path} > rows.jsonl"
    return DataError(
        f"{origin}: the columns {columns} are of no known format",
        hint=hint,
        location=Location(file=origin.path, line=origin.line),
    )


def _nearest_columns(shape: Shape, fields: Mapping[str, object]) -> dict[str, str]:
    """Return needed columns of ``shape`` with those of the row that are equal or look like slips of them."""
    pairs = dict[str, str]()
    for names in shape.needed:
        for name in names:
            match = name if name in fields else _slip(name, fields)
            if match and match not in pairs.values():
                pairs[name] = match
                break
    return pairs


def _slip(name: str, fields: Iterable[str]) -> str:
    from difflib import SequenceMatcher

    scores = {field: SequenceMatcher(None, name, field.strip().lower()).ratio() for field in fields}
    best = max(scores, key=lambda field: scores[field], default="")
    return best if scores.get(best, 0) > 0.8 else ""


def _score(format_: Format, pairs: Mapping[str, str]) -> float:
    needed = _BY_FORMAT[format_].needed
    return len(pairs) / len(needed) + 0.01 * len(pairs)


def _shell(name: str) -> str:
    return name if name.replace("_", "").isalnum() else repr(name)


def _is_list_of_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def field_fault(name: str, value: object) -> str:
    """Return what is wrong with a column whose value is not text."""
    return f'"{name}" is {json_type(value)}, expected text'


Convert = Callable[[Mapping[str, object]], object]
