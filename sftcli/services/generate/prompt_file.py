"""Files of prompts: a prompt a line in a text file, or the rows of any file that training reads."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from sftcli import storage
from sftcli.data.conversations.detect import check_renames, parse_renames, renamed
from sftcli.data.conversations.formats import CHAT_COLUMNS, SYSTEM_COLUMNS
from sftcli.data.conversations.keys.dropped_keys import parse_ignored, without_keys
from sftcli.data.conversations.keys.key_checks import check_prompt, unread_in_prompt
from sftcli.data.conversations.keys.meaning import Unread, UnreadError, first_filled, is_filled
from sftcli.data.conversations.messages import Message, RowFault, role_of
from sftcli.data.conversations.turns import json_in, turns_or_text
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import Source, SourceKind, near_files, parse_source, row_format
from sftcli.data.reading.text_lines import ByteStream, as_utf8, no_note, skip_bom, text_lines, unpacked
from sftcli.errors import DataError, Location, NotFoundError, UsageError

_HINT = 'a row is {"prompt": "..."}, {"instruction": "...", "input": "..."} or {"messages": [...]}, or has their columns'
_TEXTS = ("prompt", "question", "instruction", "input")  # columns that are asked, the first of them


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row of a prompt file; ``line`` is 1-based, ``row`` is what it holds."""

    line: int
    row: Mapping[str, object]
    messages: tuple[Message, ...]


def read_prompts(
    path: Path, *, system: str, ignored: Iterable[str] = (), renames: Iterable[str] = ()
) -> list[PromptRow]:
    """Read the prompts of a file: of ``.txt`` one a line, blank lines left out, else one a row.

    Args:
        path: The file.
        system: System text of prompts that bring none.
        ignored: Keys that are dropped, although they say something.
        renames: Columns that are read under another name, each ``OURS=THEIRS``.

    Raises:
        NotFoundError: There is no such file.
        UsageError: No row has a column that is renamed.
        DataError: It is of no known kind or broken, a row is no prompt or says something that is not read, or there is none.
    """
    dropped, names = parse_ignored(ignored), parse_renames(renames)
    source = _source(str(path))
    is_text = row_format(source.files[0]) == "text"
    records = list(_lines(source) if is_text else read_records(source, seed=0))
    if not records:
        raise DataError(f"{path} holds no prompt", hint="write a prompt on each line")
    check_renames(records, names)
    return [
        PromptRow(
            line=record.origin.line,
            row=record.fields,
            messages=messages_of_row(
                without_keys(renamed(record.fields, names), dropped), system, record.origin
            ),
        )
        for record in records
    ]


def _source(name: str) -> Source:
    source = parse_source(name)
    if source.kind is SourceKind.HUB:
        raise NotFoundError(f"no file {name!r}", hint=near_files(source.name), location=Location(file=name))
    if len(source.files) != 1:
        raise UsageError(f"{name} holds several files", hint="answer one after the other: --file FILE")
    return source


def _lines(source: Source) -> Iterator[RawRecord]:
    (path,) = source.files
    with path.open("rb") as file:
        stream: ByteStream = as_utf8(unpacked(file, path), source.name, no_note)
        offset = skip_bom(stream, source.name, no_note)
        for number, line in text_lines(stream, source.name, offset=offset):
            if line.strip():
                yield RawRecord(
                    fields={"prompt": line.rstrip("\r\n")}, origin=Origin(path=source.name, line=number)
                )


def check_out(out: Path) -> None:
    """Make sure that the answers can be written to ``out``, before there are any.

    Raises:
        OutputError: It exists, or its place is none.
    """
    storage.require_new(out, hint="choose another --out")


def messages_of_row(row: Mapping[str, object], system: str, origin: Origin) -> tuple[Message, ...]:
    """Return the turns of a row up to the answer that is asked for, its system text or ``system`` in front.

    Raises:
        DataError: It is no prompt, or it asks something that is not read.
    """
    try:
        turns, own_system = _asked(row)
    except UnreadError as error:
        unread = error.found[0]
        hint = unread.remedy + (f"; or ask without it: {unread.way_out}" if unread.way_out else "")
        raise DataError(unread.what, hint=hint, location=_place(origin)) from None
    except RowFault as fault:
        raise DataError(f"{origin}: {fault.detail}", hint=_HINT, location=_place(origin)) from None
    if not turns or not turns[-1].content.strip():
        raise DataError(f"{origin}: there is nothing to answer", hint=_HINT, location=_place(origin))
    system = own_system or system
    if system and turns[0].role != "system":
        turns.insert(0, Message(role="system", content=system))
    return tuple(turns)


def _asked(row: Mapping[str, object]) -> tuple[list[Message], str]:
    column = next((name for name in (*CHAT_COLUMNS, *_TEXTS) if is_filled(row.get(name))), "")
    if not column:
        if any(name in row for name in (*CHAT_COLUMNS, *_TEXTS)):
            return [], ""
        raise _no_prompt(row)
    read = {column, *SYSTEM_COLUMNS}
    about = first_filled(row, ("input", "context")) if column == "instruction" else ""
    value = json_in(row[column], f'"{column}"') if column in CHAT_COLUMNS else row[column]
    raw = value if isinstance(value, list) else []
    while raw and isinstance(raw[-1], dict) and role_of(raw[-1]) == "assistant":
        raw = raw[:-1]
    check_prompt(row, raw, read=frozenset({*read, about}))
    turns = [
        Message(role=turn.role, content=turn.content)
        for turn in turns_or_text(raw if isinstance(value, list) else value, column, "user")
    ]
    _check_rivals(row, column, turns)
    if about and isinstance(more := row.get(about), str) and more:
        turns = [Message(role="user", content=f"{turns[0].content}\n\n{more}")]
    own = row.get(first_filled(row, SYSTEM_COLUMNS))
    return turns, own if isinstance(own, str) else ""


def _check_rivals(row: Mapping[str, object], column: str, turns: list[Message]) -> None:
    """See that no other column asks something else: some files repeat the first turn in one."""
    said = "\n".join(turn.content for turn in turns)
    names = [name for name in (*CHAT_COLUMNS, *_TEXTS[:-1], "instances") if name != column]
    for name in names:
        value = row.get(name)
        if is_filled(value) and not (isinstance(value, str) and value.strip() in said):
            raise UnreadError([unread_in_prompt(name)])


def _no_prompt(row: Mapping[str, object]) -> UnreadError:
    columns = {name: value for name, value in row.items() if isinstance(value, str)}
    longest = max(columns, key=lambda name: len(columns[name]), default="")
    remedy = f"name the one that is asked: --map prompt={quote(longest)}" if longest else _HINT
    return UnreadError([Unread(f"no column holds a prompt; there are {', '.join(row)}", remedy)])


def _place(origin: Origin) -> Location:
    return Location(file=origin.path, line=origin.line)
