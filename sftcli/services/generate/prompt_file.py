"""Files of prompts: one a line in a text file, or one JSON value a line."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sftcli import storage
from sftcli.data.conversations.formats import SYSTEM_COLUMNS
from sftcli.data.conversations.keys.dropped_keys import parse_ignored, without_keys
from sftcli.data.conversations.keys.key_checks import check_prompt
from sftcli.data.conversations.keys.meaning import UnreadError, first_filled
from sftcli.data.conversations.messages import Message
from sftcli.errors import DataError, Location, NotFoundError, OutputError

_HINT = 'each line is text, {"prompt": "..."}, {"instruction": "...", "input": "..."} or {"messages": [...]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row of a prompt file; ``line`` is 1-based, ``row`` is what the line holds."""

    line: int
    row: object
    messages: tuple[Message, ...]


def read_prompts(path: Path, *, system: str, ignored: Iterable[str] = ()) -> list[PromptRow]:
    """Read the prompts of a ``.jsonl`` file, or of a text file with one prompt a line. Blank lines are left out.

    Args:
        path: The file.
        system: System text of prompts that bring none.
        ignored: Keys that are dropped, although they say something.

    Raises:
        NotFoundError: There is no such file.
        DataError: It is not UTF-8, a line is no prompt or says something that is not read, or there is none.
    """
    dropped = parse_ignored(ignored)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", hint="save it as UTF-8") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = (
            _parse(line, path, number) if path.suffix in {".jsonl", ".ndjson", ".json"} else line.rstrip("\r")
        )
        rows.append(PromptRow(line=number, row=row, messages=_messages(row, system, path, number, dropped)))
    if not rows:
        raise DataError(f"{path} holds no prompt", hint=_HINT)
    return rows


def check_out(out: Path) -> None:
    """Make sure that the answers can be written to ``out``, before there are any.

    Raises:
        OutputError: It exists, or its place is none.
    """
    if out.exists():
        raise OutputError(f"{out} exists already", hint="choose another --out, or delete it")
    storage.require_place(out, hint="choose another --out")


def _parse(line: str, path: Path, number: int) -> object:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _fault(path, number, f"the line is not JSON: {error}") from error
    try:
        json.dumps(value, ensure_ascii=False).encode()  # it is written beside its answer
    except UnicodeEncodeError as error:
        broken = ord(error.object[error.start])
        raise _fault(path, number, f"the line holds half of a surrogate pair (\\u{broken:04x})") from None
    return value


def _messages(
    row: object, system: str, path: Path, number: int, ignored: frozenset[str]
) -> tuple[Message, ...]:
    if isinstance(row, str):
        turns = [Message(role="user", content=row)]
    elif isinstance(row, dict):
        turns, own_system = _asked(without_keys(row, ignored), path, number)
        system = own_system or system
    else:
        raise _fault(path, number, "the line is neither text nor an object")
    if not turns or not turns[-1].content.strip():
        raise _fault(path, number, "there is nothing to answer")
    if system and turns[0].role != "system":
        turns.insert(0, Message(role="system", content=system))
    return tuple(turns)


def _asked(row: Mapping[str, object], path: Path, number: int) -> tuple[list[Message], str]:
    """Return the turns of an object, up to the answer that is asked for, and its system text.

    Raises:
        DataError: It is no prompt, or it asks something that is not read.
    """
    turns = row.get("messages")
    if isinstance(turns, list):
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns = turns[:-1]
        read, about = frozenset(SYSTEM_COLUMNS), ""
    else:
        about = first_filled(row, ("input", "context"))
        read = frozenset((*SYSTEM_COLUMNS, *((about,) if _prompt_column(row) == "instruction" else ())))
    try:
        check_prompt(row, turns if isinstance(turns, list) else (), read=read)
    except UnreadError as error:
        unread = error.found[0]
        raise DataError(
            unread.what,
            hint=unread.remedy + (f"; or ask without it: {unread.way_out}" if unread.way_out else ""),
            location=Location(file=str(path), line=number),
        ) from None
    system = row.get(first_filled(row, SYSTEM_COLUMNS))
    own_system = system if isinstance(system, str) else ""
    if isinstance(turns, list):
        return [_turn(turn, path, number) for turn in turns], own_system
    return [Message(role="user", content=_prompt(row, about, path, number))], own_system


def _turn(turn: object, path: Path, number: int) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role"), turn.get("content")
        if role in {"system", "user", "assistant", "tool"} and isinstance(content, str):
            return Message(role=role, content=content)
    raise _fault(path, number, "a message needs a role (system, user, assistant or tool) and text as content")


def _prompt(row: Mapping[str, object], about: str, path: Path, number: int) -> str:
    name = _prompt_column(row)
    if not name:
        raise _fault(path, number, "the object has no prompt")
    more = row.get(about) if name == "instruction" else None
    return f"{row[name]}\n\n{more}" if isinstance(more, str) and more else str(row[name])


def _prompt_column(row: Mapping[str, object]) -> str:
    return next(
        (name for name in ("prompt", "question", "instruction") if isinstance(row.get(name), str)), ""
    )


def _fault(path: Path, number: int, text: str) -> DataError:
    return DataError(text, hint=_HINT, location=Location(file=str(path), line=number))
