"""Keys that are dropped on purpose: taken out of rows and turns before they are read."""

from collections.abc import Iterable, Mapping

from sftcli.data.conversations.formats import CHAT_COLUMNS, RATINGS, TOOL_COLUMNS, RowFormat, known_columns
from sftcli.data.conversations.keys.meaning import BY_KEY, THINKING_PARTS, TREE
from sftcli.data.reading.json_rows import decode_inner
from sftcli.errors import UsageError
from sftcli.suggest import did_you_mean

_TURN_KEYS = BY_KEY.keys() - TREE.keys  # those that are dropped from turns too


def parse_ignored(keys: Iterable[str]) -> frozenset[str]:
    """Return the keys that are to be dropped.

    Raises:
        UsageError: Rows are read and refused in the same way with one of them and without it.
    """
    known = {*BY_KEY, *THINKING_PARTS, *RATINGS, *frozenset[str]().union(*map(known_columns, RowFormat))}
    for key in (ignored := frozenset(keys)):
        if key not in known:
            raise UsageError(
                f"{key!r} is not read and changes nothing, so it cannot be ignored",
                hint=did_you_mean(key, known) or "leave out --ignore; rows may hold it",
            )
    return ignored


def without_keys(fields: Mapping[str, object], ignored: frozenset[str]) -> Mapping[str, object]:
    """Return a row without ``ignored``, also in its turns where the table knows a key there."""
    return {
        name: value if name in TOOL_COLUMNS else _turns_without(value, ignored, is_chat=name in CHAT_COLUMNS)
        for name, value in fields.items()
        if name not in ignored
    }


def _turns_without(value: object, ignored: frozenset[str], *, is_chat: bool) -> object:
    if is_chat and isinstance(value, str):
        try:
            value = decode_inner(value)
        except ValueError:  # who reads the turns says why
            return value
    if isinstance(value, list):
        return [_turn_without(item, ignored) for item in value]
    return _turn_without(value, ignored)


def _turn_without(turn: object, ignored: frozenset[str]) -> object:
    """Return a turn, or a part of its content, without ``ignored``; anything else as it is."""
    if not isinstance(turn, dict):
        return turn
    kept = {key: value for key, value in turn.items() if key not in ignored or key not in _TURN_KEYS}
    for key in ("content", "value"):
        if isinstance(parts := kept.get(key), list):
            kept[key] = [
                _turn_without(part, ignored)
                for part in parts
                if not (isinstance(part, dict) and str(part.get("type")) in ignored)
            ]
    return kept
