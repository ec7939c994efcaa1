"""The formats of instruction data that are known by their columns, and what to say about a row that has none of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum
from functools import lru_cache
from pathlib import PurePath
from shlex import quote

from sftcli.data.reading.record import Origin
from sftcli.errors import DataError, Location

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "instruction", *CHAT_COLUMNS)
SYSTEM_COLUMNS = ("system", "system_prompt")
INSTRUCTIONS_COLUMN = "instructions"  # of OpenAI's Responses: a system text
TOOL_COLUMNS = ("tools", "functions")
ANSWER_COLUMNS = ("output", "response")
RATINGS = (
    "labels",
    "label",
    "ratings",
    "scores",
    "rewards",
    "ranks",
)  # of several answers, where they are lists
TURN_MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
THINKING_COLUMNS = (
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "thinking_blocks",
    "thought",
    "thoughts",
)
TURN_KEYS = frozenset(
    (
        *("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name"),
        *TURN_MARKS,
        *THINKING_COLUMNS,
    )
)
_SLIP_RATIO = 0.8


class RowFormat(StrEnum):
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
    OPENAI_PREFERENCE = "OpenAI preference"
    TOKENS = "token ids"


@dataclass(frozen=True, slots=True)
class ColumnSet:
    """The columns of a format. ``needed`` holds alternatives: one of each must be there."""

    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()

    def is_met_by(self, fields: Iterable[str]) -> bool:
        """Whether a row with these columns has this shape."""
        return all(any(name in fields for name in names) for names in self.needed)

    def touches(self, fields: Iterable[str]) -> bool:
        """Whether a row with these columns has at least one that is needed here, so that it may only lack another."""
        return any(name in fields for names in self.needed for name in names)


TOKEN_COLUMNS = (
    *("labels", "attention_mask", "loss_mask", "completion_mask", "assistant_masks", "position_ids"),
)
VARIABLES_COLUMN = "chat_template_kwargs"
HISTORY_COLUMN = "history"
LABEL_COLUMNS = ("label", "kto_tag")
_SIDES = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, VARIABLES_COLUMN)
_ANSWER_SIDES = (*SYSTEM_COLUMNS, *THINKING_COLUMNS, VARIABLES_COLUMN, HISTORY_COLUMN)

# The first shape that a row meets is its format: columns that no other format reads decide before common ones.
COLUMN_SETS: Mapping[RowFormat, ColumnSet] = {
    RowFormat.PREFERENCE: ColumnSet((("chosen",),), (*PROMPT_COLUMNS, *_SIDES)),
    RowFormat.MESSAGES: ColumnSet((CHAT_COLUMNS,), _SIDES),
    RowFormat.SHAREGPT: ColumnSet((CHAT_COLUMNS,), _SIDES),
    RowFormat.INSTANCES: ColumnSet((("instruction",), ("instances",)), _ANSWER_SIDES),
    RowFormat.DOLLY: ColumnSet(
        (("instruction",), ("context",), ("response",)), ("input", "output", *_ANSWER_SIDES)
    ),
    RowFormat.ALPACA: ColumnSet((("instruction",), ANSWER_COLUMNS), ("input", *_ANSWER_SIDES)),
    RowFormat.OPENORCA: ColumnSet((("question",), ("response",)), _ANSWER_SIDES),
    RowFormat.PROMPT_COMPLETION: ColumnSet(
        (("prompt",), ("completion", "completions")), (*TOOL_COLUMNS, *_ANSWER_SIDES)
    ),
    RowFormat.PROMPT_RESPONSE: ColumnSet(
        (("prompt",), ("response", "responses")), (*TOOL_COLUMNS, *_ANSWER_SIDES)
    ),
    RowFormat.QUESTION_ANSWER: ColumnSet((("question",), ("answer",)), _ANSWER_SIDES),
    RowFormat.INPUT_OUTPUT: ColumnSet(
        (("input",), ("output",)), (*TOOL_COLUMNS, *_ANSWER_SIDES, INSTRUCTIONS_COLUMN)
    ),
    RowFormat.TEXT: ColumnSet((("text",),)),
    RowFormat.OPENAI_PREFERENCE: ColumnSet((("preferred_output",), ("input",))),
    RowFormat.TOKENS: ColumnSet((("input_ids",),), TOKEN_COLUMNS),
}

# Formats of one family may stand in one file; the second of each reads both. Dolly rows without a context are Alpaca
# rows, and turns say themselves whether they have `role` or `from`.
_FAMILIES = ((RowFormat.ALPACA, RowFormat.DOLLY), (RowFormat.MESSAGES, RowFormat.SHAREGPT))


def known_columns(format_: RowFormat) -> frozenset[str]:
    """Return the columns that rows of this format are read from."""
    shape = COLUMN_SETS[format_]
    return frozenset((*(name for names in shape.needed for name in names), *shape.optional))


def find_format(fields: Mapping[str, object]) -> RowFormat | None:
    """Return the format of one row, None when it is of no known one."""
    found = _format_of_columns(tuple(fields))
    if found is RowFormat.MESSAGES and _speaks_sharegpt(fields):
        return RowFormat.SHAREGPT
    return found


@lru_cache(maxsize=1024)
def _format_of_columns(columns: tuple[str, ...]) -> RowFormat | None:
    return next((format_ for format_, shape in COLUMN_SETS.items() if shape.is_met_by(columns)), None)


def _speaks_sharegpt(fields: Mapping[str, object]) -> bool:
    turns = next(fields[column] for column in CHAT_COLUMNS if column in fields)
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        return "from" in turns[0]
    return isinstance(turns, str) and '"from"' in turns


def common_format(one: RowFormat, other: RowFormat) -> RowFormat | None:
    """Return the format that reads rows of both, None when there is none."""
    if one is other:
        return one
    return next((family[1] for family in _FAMILIES if one in family and other in family), None)


def mixed_shapes(
    format_: RowFormat, columns: Iterable[str], origin: Origin, fields: Mapping[str, object], other: Origin
) -> DataError:
    """Return the error for a row that is of another format than those before it, with the place of each."""
    found = find_format(fields)
    hint = "put rows of different formats into files of their own"
    if found is None and (near := near_format(fields)):
        hint += f"; the second is nearest to {near}"
    return DataError(
        f"the rows have two formats: {origin} is {format_} ({', '.join(columns)}),"
        f" {other} is {found or 'of no known format'} ({', '.join(fields)})",
        hint=hint,
        location=Location(file=other.path, line=other.line),
    )


def unknown_shape(fields: Mapping[str, object], origin: Origin) -> DataError:
    """Return the error for rows of no known format: their columns, and how to map them to the nearest one."""
    nested = next((name for name, value in fields.items() if _holds_rows(value)), "")
    if nested:
        # Never into the file that is read: the shell would empty it first.
        source, target = quote(origin.path), quote(f"{PurePath(origin.path).stem}-rows.jsonl")
        hint = f"the rows seem to be inside {nested!r}: jq -c '.{nested}[]' {source} > {target}"
    else:
        near = near_format(fields)
        hint = (
            f"they can be read as {near}"
            if near
            else "map them to a known format: --map prompt=COLUMN --map response=COLUMN"
        )
    return DataError(
        f"{origin}: the columns {', '.join(map(repr, fields)) or '(none)'} are of no known format",
        hint=hint,
        location=Location(file=origin.path, line=origin.line),
    )


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def near_format(fields: Mapping[str, object]) -> str:
    """Return the known format that a row nearly has and the options that make it so; empty when none is near."""
    pairs = {format_: _nearest_columns(shape, fields) for format_, shape in COLUMN_SETS.items()}
    best = max(pairs, key=lambda format_: len(pairs[format_]) / len(COLUMN_SETS[format_].needed))
    if not pairs[best]:
        return ""
    maps = [f"--map {ours}={_quoted(theirs)}" for ours, theirs in pairs[best].items() if ours != theirs]
    missing = [names for names in COLUMN_SETS[best].needed if not any(name in pairs[best] for name in names)]
    maps += [f"--map {names[0]}=COLUMN" for names in missing]
    return f"{best} rows, with {' '.join(maps)}"


def _nearest_columns(shape: ColumnSet, fields: Iterable[str]) -> dict[str, str]:
    """Return needed columns of ``shape`` with those of the row that are the same or a slip of them."""
    pairs = dict[str, str]()
    for names in shape.needed:
        for name in names:
            match = _nearest(name, [field for field in fields if field not in pairs.values()])
            if match:
                pairs[name] = match
                break
    return pairs


def _nearest(name: str, fields: Iterable[str]) -> str:
    scores = {field: SequenceMatcher(None, name, field.strip().lower()).ratio() for field in fields}
    best = max(scores, key=lambda field: (scores[field], field == name), default="")
    return best if scores.get(best, 0) > _SLIP_RATIO else ""


def _quoted(name: str) -> str:
    return name if name.replace("_", "").isalnum() else repr(name)
