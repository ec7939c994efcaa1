"""Reasoning that a row has apart from its answer: under one of many keys, as a text or in parts."""

from collections.abc import Mapping

from sftcli.data.conversations.formats import THINKING_COLUMNS
from sftcli.data.conversations.keys.meaning import THINKING_PARTS, is_thinking, is_told
from sftcli.data.conversations.messages import RejectReason, RowFault

_TEXT_KEYS = ("thinking", "text", "reasoning", "content", "summary", "value")


def read_thinking(fields: Mapping[str, object], where: str = "") -> str:
    """Return the thinking of a turn, or of a row with columns; empty where it has none.

    Raises:
        RowFault: It is told twice and differently, or has no text.
    """
    if fields.keys().isdisjoint(THINKING_COLUMNS):  # nearly always
        return ""
    found = {
        key: _text(fields[key], f'{where}"{key}"')
        for key in THINKING_COLUMNS
        if key in fields and is_thinking(fields[key])
    }
    texts = list(dict.fromkeys(text.strip() for text in found.values()))
    if len(texts) > 1:
        names = " and ".join(f'"{key}"' for key in found)
        raise RowFault(RejectReason.WRONG_TYPE, f"{where}{names} hold different thinking")
    return next(iter(found.values()), "")


def is_thinking_part(part: object) -> bool:
    """Return whether a part of a content is thinking."""
    return isinstance(part, dict) and part.get("type") in THINKING_PARTS


def part_text(part: object, where: str) -> str:
    """Return the text of a part that is thinking.

    Raises:
        RowFault: It has none.
    """
    return _text(part, where)


def _text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n\n".join(_text(part, where) for part in value if is_told(part))
    if isinstance(value, dict):
        inner = next((value[key] for key in _TEXT_KEYS if is_told(value.get(key))), None)
        if inner is not None:
            return _text(inner, where)
    raise RowFault(RejectReason.WRONG_TYPE, f"{where} holds thinking without a text")
