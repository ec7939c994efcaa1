"""Refuses keys that say something and are not read: in rows, in turns, in parts of a content."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from sftcli.data.conversations.formats import (
    HISTORY_COLUMN,
    THINKING_COLUMNS,
    TOKEN_COLUMNS,
    TOOL_COLUMNS,
    TURN_MARKS,
    VARIABLES_COLUMN,
    RowFormat,
    known_columns,
)
from sftcli.data.conversations.keys.meaning import (
    ASKED_MARKS,
    BY_KEY,
    LABEL,
    MARKS,
    THINKING,
    TREE,
    Unread,
    UnreadError,
    is_false,
    is_filled,
    is_told,
    is_true,
)
from sftcli.data.conversations.messages import role_of

_MARKS = frozenset(key for key, meanings in BY_KEY.items() if any(m.says == MARKS.says for m in meanings))
_PLAIN_TURN = frozenset(("role", "content", "from", "value"))


def is_untrained(turn: Mapping[str, object]) -> bool:
    """Whether an assistant turn, or a part of its content, is marked as one that is not trained."""
    return not turn.keys() <= _PLAIN_TURN and any(is_false(turn.get(mark)) for mark in TURN_MARKS)


def check_turn(turn: Mapping[str, object], *, is_assistant: bool) -> None:
    """See that a turn says nothing that is not read.

    Raises:
        UnreadError: It does.
    """
    if turn.keys() <= _PLAIN_TURN:  # nearly always
        return
    found = [
        meaning.unread(key, " of turns")
        for key in turn
        for meaning in BY_KEY.get(key, ())
        if meaning.turn(turn[key])
        and not (key in TURN_MARKS and is_false(turn[key]))
        and not (is_assistant and meaning is THINKING)
    ]
    found += [] if is_assistant else _asked_marks(turn, " of turns")
    if found:
        raise UnreadError(found)


def _asked_marks(marked: Mapping[str, object], where: str) -> list[Unread]:
    # OpenAI knows `weight` for answers alone, and tables repeat it.
    return [
        ASKED_MARKS.unread(key, where) for key in TURN_MARKS if key != "weight" and is_true(marked.get(key))
    ]


def check_thinking_part(part: Mapping[str, object]) -> None:
    """See that a part of a content that is thinking has no mark: it is trained as the settings say.

    Raises:
        UnreadError: It has one.
    """
    remedy = "--thinking keep leaves all thinking without loss"
    found = [
        Unread(f'"{key}" of content parts that are thinking is not read: {MARKS.says}', remedy, key)
        for key in part
        if key in _MARKS and is_told(part[key]) and not is_true(part[key])
    ]
    if found:
        raise UnreadError(found)


def check_part(part: Mapping[str, object], *, is_assistant: bool) -> None:
    """See that a part of a content says nothing that is not read.

    Raises:
        UnreadError: It does.
    """
    found = [
        meaning.unread(key, " of content parts")
        for key in part
        for meaning in BY_KEY.get(key, ())
        if meaning.part(part[key]) and not (key in TURN_MARKS and is_false(part[key]))
    ]
    found += [] if is_assistant else _asked_marks(part, " of content parts")
    if found:
        raise UnreadError(found)


def check_keys(fields: Mapping[str, object], format_: RowFormat, *, read: frozenset[str]) -> None:
    """See that no key of a row says something that is not read.

    Args:
        fields: The row.
        format_: Its format.
        read: Keys that something else reads.

    Raises:
        UnreadError: One does.
    """
    names = _keys_to_look_at(tuple(fields), format_)
    found = [
        meaning.unread(key)
        for key in names
        if key not in read
        for meaning in BY_KEY[key]
        if meaning.row(fields[key])
    ]
    if found:
        raise UnreadError(found)


def has_one_answer(format_: RowFormat) -> bool:
    """Return whether a row of this format has columns for one answer, its thinking and the turns before it."""
    return not known_columns(format_).isdisjoint(THINKING_COLUMNS)


@lru_cache(maxsize=1024)
def _keys_to_look_at(columns: tuple[str, ...], format_: RowFormat) -> tuple[str, ...]:
    is_text, is_message = format_ is RowFormat.TEXT, "role" in columns
    passed = LABEL.keys if is_text else ()  # of a text, not of an answer
    passed += (*THINKING.keys, HISTORY_COLUMN) if has_one_answer(format_) else ()
    passed += () if is_text else (VARIABLES_COLUMN,)
    passed += TOKEN_COLUMNS if format_ is RowFormat.TOKENS else ()
    passed += () if is_text and is_message else TREE.keys
    return tuple(key for key in columns if key in BY_KEY and key not in passed)


def check_prompt(row: Mapping[str, object], turns: Sequence[object], *, read: frozenset[str]) -> None:
    """See that a row that is to be answered asks nothing that is not read. Marks say nothing here: nothing is trained.

    Args:
        row: The row.
        turns: Its turns in front of the answer.
        read: Its columns that are read.

    Raises:
        UnreadError: It does.
    """
    names = (*TOOL_COLUMNS, "context", "input", "system_prompt")
    found = [unread_in_prompt(key) for key in names if key not in read and is_filled(row.get(key))]
    found += [
        meaning.unread(key)
        for key in row
        for meaning in BY_KEY.get(key, ())
        if meaning.asks and meaning.row(row[key])
    ]
    if found:
        raise UnreadError(found)
    for turn in turns:
        if isinstance(turn, dict):
            check_turn(
                {key: turn[key] for key in turn if key not in _MARKS},
                is_assistant=role_of(turn) not in ("system", "user"),
            )
            if calls := [key for key in ("tool_calls", "function_call") if is_filled(turn.get(key))]:
                what = f'"{calls[0]}" of turns is not read in files of prompts'
                raise UnreadError([Unread(what, "leave out rows with calls")])


def unread_in_prompt(key: str) -> Unread:
    """Return what is said of a column of a row that is to be answered, which is not read."""
    return Unread(
        f'"{key}" is not read in files of prompts',
        "write it into the prompt",
        key,
    )
