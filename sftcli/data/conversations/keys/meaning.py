"""What a row says beside its texts, and what happens to it: it is read, it is harmless, or the row is refused by name.

Keys are of three kinds. `formats` and `turns` know those that are read. The table here holds those that are not read and
change what a row means: rows trained without them are not the rows that their author wrote, so they are refused until the key
is taken out, or dropped on purpose. All others are harmless, such as ids, dates and sources. A key whose value says nothing,
such as null, an empty list, or the mark that a row is trained, is harmless too: tables fill such values in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sftcli.data.conversations.formats import (
    LABEL_COLUMNS,
    THINKING_COLUMNS,
    TOOL_COLUMNS,
    TURN_MARKS,
)

Speaks = Callable[[object], bool]
"""Whether a value says something that is lost where it is not read."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Something in a row that is not read and changes what the row means."""

    what: str  # a sentence without its end, the same for every row that has it
    remedy: str  # what makes it read, or needless
    key: str = ""  # that drops it where it is ignored
    flag: str = ""  # that lets it be, where no key does

    @property
    def way_out(self) -> str:
        """The flag that goes on without it; empty where there is none."""
        return f"--ignore {self.key}" if self.key else self.flag


class UnreadError(Exception):
    """A row says something that is not read."""

    def __init__(self, found: Sequence[Unread]) -> None:
        super().__init__("; ".join(unread.what for unread in found))
        self.found = found


# Values


def is_filled(value: object) -> bool:
    """Whether a column or key holds something: not null, blank, empty, or the number that tables write for null."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | dict):
        return bool(value)
    return value is not None and value == value


def is_told(value: object) -> bool:
    """Whether anything is in a value, also inside lists and objects, which tables fill with nulls."""
    if isinstance(value, dict):
        return any(map(is_told, value.values()))
    if isinstance(value, list):
        return any(map(is_told, value))
    return is_filled(value) and value not in ("[]", "{}", "null")


def is_true(value: object) -> bool:
    """Whether a value is true or 1, as JSON writes it, or as text, which is all that CSV has."""
    return _written(value) in ("true", "1", "1.0")


def is_false(value: object) -> bool:
    """Whether a value is false or 0, in the same spellings."""
    return _written(value) in ("false", "0", "0.0")


def _written(value: object) -> str:
    return str(value).strip().lower() if isinstance(value, str | bool | int | float) else ""


def is_thinking(value: object) -> bool:
    """Whether a value is a text or parts of one; a number or a word such as "on" tells about thinking, and holds none."""
    if isinstance(value, str):
        return is_told(value) and _written(value) not in ("on", "off", "yes", "no", "true", "false")
    return isinstance(value, list | dict) and is_told(value)


def _is_mark(value: object) -> bool:
    return is_told(value) and not is_true(value)


def _is_media(value: object) -> bool:
    return is_told(value) and not isinstance(value, bool)


def _is_other_channel(value: object) -> bool:
    return is_told(value) and value != "final"


def _never(_: object) -> bool:
    return False


def first_filled(fields: Mapping[str, object], names: Sequence[str]) -> str:
    """Return the first of ``names`` that holds something, else the first that is a column, else the first."""
    filled = next((name for name in names if is_filled(fields.get(name))), "")
    return filled or next((name for name in names if name in fields), names[0])


# The table


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """Keys of one meaning. ``row``, ``turn`` and ``part`` tell when a value there is refused; ``says`` is why.

    ``asks`` tells that it says something about a prompt too, and not about an answer or its training alone.
    """

    keys: tuple[str, ...]
    says: str
    remedy: str
    row: Speaks = _never
    turn: Speaks = _never
    part: Speaks = _never
    asks: bool = False

    def unread(self, key: str, where: str = "") -> Unread:
        """Return what is said about ``key``."""
        return Unread(f'"{key}"{where} is not read: {self.says}', self.remedy, key)


THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking")

MARKS = Meaning(
    keys=(*TURN_MARKS, "loss_scale"),
    says="it marks what is to be trained, and how much",
    remedy="mark assistant turns, and parts of their contents, with 0 or 1: other weights are not supported yet; remove rows that should not be trained",
    row=_is_mark,
    turn=_is_mark,
    part=_is_mark,
)
ASKED_MARKS = Meaning(
    keys=TURN_MARKS,
    says="it asks for a turn to be trained that is not the assistant's",
    remedy="only assistant turns are trained: remove the mark from the others",
)
LABEL = Meaning(
    keys=LABEL_COLUMNS,
    says="false or 0 may mark a bad answer, and all answers would be trained",
    remedy="leave rows with bad answers out of the file, or drop the key where it is a class",
    row=is_false,
)
OTHER_LABEL = Meaning(
    keys=LABEL_COLUMNS,
    says="other rows mark good and bad answers with it, and here it is neither true nor false",
    remedy="leave rows without true or false out of the file, or drop the key where it is a class",
)
TREE = Meaning(
    keys=("role", "parent_id"),
    says="the row is one message of a conversation, and would be trained as pretraining text",
    remedy='put the turns of each conversation into one row: {"messages": [{"role": ..., "content": ...}, ...]}',
    row=is_told,
)
THINKING = Meaning(
    keys=THINKING_COLUMNS,
    says="it holds thinking, and no answer stands beside it",
    remedy="put it into the turn of its answer",
    row=is_thinking,
    turn=is_thinking,
    part=is_thinking,
)
MEANINGS = (
    THINKING,
    MARKS,
    Meaning(
        keys=("mask", "train_detail", "training_detail"),
        says=MARKS.says,
        remedy=MARKS.remedy,
        row=is_told,
        turn=is_told,
        part=is_told,
    ),
    LABEL,
    TREE,
    Meaning(
        keys=("history",),
        asks=True,
        says="it holds earlier turns, and the last one would be trained without them",
        remedy='write the turns as {"messages": [{"role": ..., "content": ...}, ...]}',
        row=is_told,
    ),
    Meaning(
        keys=("chat_template_kwargs",),
        asks=True,
        says="it switches the chat template for the row",
        remedy="put rows that need another template into a file of their own, and choose one with --template",
        row=is_told,
    ),
    Meaning(
        keys=("images", "image", "videos", "video", "audios", "audio"),
        asks=True,
        says="it is not text, and answers would be trained without the content they refer to",
        remedy="remove the rows that need it",
        row=_is_media,
        turn=_is_media,
    ),
    Meaning(
        keys=("channel",),
        says="it marks the purpose of a turn, such as thinking",
        remedy="write thinking into the content of its answer, as <think>...</think>",
        turn=_is_other_channel,
    ),
    Meaning(
        keys=TOOL_COLUMNS,
        says="tools are read from the row",
        remedy="write the tools into a column of the row",
        turn=is_told,
    ),
)
BY_KEY: Mapping[str, tuple[Meaning, ...]] = {
    key: tuple(meaning for meaning in MEANINGS if key in meaning.keys)
    for meaning in MEANINGS
    for key in meaning.keys
}
