"""Columns that hold another prompt or answer than those that are read: which of them is meant cannot be known."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from sftcli.data.conversations.formats import (
    ANSWER_COLUMNS,
    CHAT_COLUMNS,
    COLUMN_SETS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    RowFormat,
    known_columns,
)
from sftcli.data.conversations.keys.meaning import Unread, UnreadError, first_filled, is_filled
from sftcli.data.conversations.messages import Conversation, PlainText

_ASKED = ("prompt", "question", "instruction", "input", "context")
_ANSWERS = ("completion", "response", "output", "answer", "chosen")
_ABOUT = ("input", "context")  # what a prompt is about
_CHATS = (RowFormat.MESSAGES, RowFormat.SHAREGPT)
_PAIRS = (
    RowFormat.OPENORCA,
    RowFormat.PROMPT_COMPLETION,
    RowFormat.PROMPT_RESPONSE,
    RowFormat.QUESTION_ANSWER,
)


def check_columns(fields: Mapping[str, object], format_: RowFormat, row: Conversation | PlainText) -> None:
    """See that no column that other formats read holds another prompt or answer than those that ``row`` was made of.

    Raises:
        UnreadError: One does.
    """
    others, groups = _columns_to_compare(tuple(fields), format_)
    if not (others or groups):  # nearly always
        return
    if isinstance(row, PlainText):
        said, answers, is_whole = [row.text], list[str](), False
    else:
        said = [turn.content for turn in row.messages if turn.role != "assistant"]
        answers = [turn.content for turn in row.messages if turn.role == "assistant"]
        is_whole = format_ in _CHATS and not row.num_cut  # it has its answer, whatever stands beside it
    found = [unread for names in groups for unread in _rivals(fields, names)]
    if not is_whole:
        found += [
            _other_column(name, format_, fields)
            for name in others
            if is_filled(fields[name]) and not _is_repeated(name, fields[name], said, answers)
        ]
    if found:
        raise UnreadError(found)


@lru_cache(maxsize=1024)
def _columns_to_compare(
    columns: tuple[str, ...], format_: RowFormat
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return columns that only other formats read, and groups of columns of which one alone is read."""
    known = known_columns(format_)
    apart = _ANSWERS if format_ in _CHATS else (*_ASKED, *_ANSWERS)
    others = tuple(name for name in columns if name in apart and name not in known)
    groups: list[tuple[str, ...]] = [] if format_ is RowFormat.TEXT else [SYSTEM_COLUMNS, TOOL_COLUMNS]
    groups += [CHAT_COLUMNS] if format_ in _CHATS else []
    groups += [names for names in (ANSWER_COLUMNS, _ABOUT) if known.issuperset(names)]
    return others, tuple(names for names in groups if sum(name in columns for name in names) > 1)


def _rivals(fields: Mapping[str, object], names: Sequence[str]) -> Iterable[Unread]:
    taken = first_filled(fields, names)
    for name in names:
        if is_filled(fields.get(name)) and fields[name] != fields[taken]:
            yield Unread(
                f'"{name}" is not read: it differs from "{taken}", which is',
                "keep one of them in the row",
                name,
            )


def _is_repeated(name: str, value: object, said: Sequence[str], answers: Sequence[str]) -> bool:
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if name in _ANSWERS and answers:
        return any(text == answer.strip() for answer in answers)
    wraps = name not in _ABOUT  # a prompt may be the whole text that was made of what is read
    return bool(text) and any(text in one or (wraps and one.strip() in text) for one in said)


def _other_column(name: str, format_: RowFormat, fields: Mapping[str, object]) -> Unread:
    if name in _ANSWERS:
        what, remedy = "another answer is", "leave one answer in the row"
    else:
        what, remedy = "another prompt is", "write it into the prompt"
        maps = _maps_to_alpaca(name, format_)
        columns = [name, *(one.partition("=")[2] for one in maps)]
        if maps and all(isinstance(fields[column], str) for column in columns):
            remedy = f"read both: {' '.join(maps)}"
    return Unread(f'"{name}" is not read in {format_} rows, where {what}', remedy, name)


def _maps_to_alpaca(name: str, format_: RowFormat) -> list[str]:
    """Return the options that read a row with its column ``name`` as Alpaca or Dolly; none where there are none."""
    if format_ is RowFormat.INPUT_OUTPUT:
        return [] if name in _ABOUT else [f"--map instruction={name}"]
    if name not in _ABOUT or format_ not in _PAIRS:
        return []
    (prompt, *_), (answer, *_) = COLUMN_SETS[format_].needed
    maps = {"instruction": prompt, "response": answer}
    return [f"--map {ours}={theirs}" for ours, theirs in maps.items() if ours != theirs]
