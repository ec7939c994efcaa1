"""Files of prompts: one a line in a text file, or one JSON value a line."""

import json
from dataclasses import dataclass
from pathlib import Path

from sftcli.data.conversation import Message
from sftcli.errors import DataError, Location, NotFoundError

_HINT = 'each line is text, {"prompt": "..."}, {"instruction": "...", "input": "..."} or {"messages": [...]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row of a prompt file; ``line`` is 1-based, ``row`` is what the line holds."""

    line: int
    row: object
    messages: tuple[Message, ...]


def read_prompts(path: Path, *, system: str) -> list[PromptRow]:
    """Read the prompts of a ``.jsonl`` file, or of a text file with one prompt a line. Blank lines are left out.

    Raises:
        NotFoundError: There is no such file.
        DataError: It is not UTF-8, a line is no prompt, or there is none.
    """
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
        rows.append(PromptRow(line=number, row=row, messages=_messages(row, system, path, number)))
    if not rows:
        raise DataError(f"{path} holds no prompt", hint=_HINT)
    return rows


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


def _messages(row: object, system: str, path: Path, number: int) -> tuple[Message, ...]:
    if isinstance(row, str):
        turns = [Message(role="user", content=row)]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        turns = [_turn(turn, path, number) for turn in row["messages"]]
        while turns and turns[-1].role == "assistant":
            turns.pop()  # the answer that is asked for
    elif isinstance(row, dict):
        turns = [Message(role="user", content=_prompt(row, path, number))]
        if isinstance(row.get("system"), str):
            system = row["system"]
    else:
        raise _fault(path, number, "the line is neither text nor an object")
    if not turns or not turns[-1].content.strip():
        raise _fault(path, number, "there is nothing to answer")
    if system and turns[0].role != "system":
        turns.insert(0, Message(role="system", content=system))
    return tuple(turns)


def _turn(turn: object, path: Path, number: int) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role"), turn.get("content")
        if role in {"system", "user", "assistant", "tool"} and isinstance(content, str):
            return Message(role=role, content=content)
    raise _fault(path, number, "a message needs a role (system, user, assistant or tool) and text as content")


def _prompt(row: dict[str, object], path: Path, number: int) -> str:
    for name in ("prompt", "question", "instruction"):
        value = row.get(name)
        if isinstance(value, str):
            more = row.get("input") if name == "instruction" else None
            return f"{value}\n\n{more}" if isinstance(more, str) and more else value
    raise _fault(path, number, "the object has no prompt")


def _fault(path: Path, number: int, text: str) -> DataError:
    return DataError(text, hint=_HINT, location=Location(file=str(path), line=number))
