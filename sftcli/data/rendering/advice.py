"""What would keep a row that the template does not take: settings, each tried before it is named.

They are tried on a sample of the row, with its turns, tags and white space and other words, so that rows alike need one trial and
what is said does not depend on which of them comes first.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.messages import Conversation, Message, Rejected, RejectReason
from sftcli.data.conversations.remedies import NO_SYSTEM, with_flags
from sftcli.data.reading.record import Origin
from sftcli.data.rendering.conversation_shape import find_thinking

SAMPLES_KEPT = 4096
ADVISED = frozenset(
    (
        RejectReason.TEMPLATE_REFUSED,
        RejectReason.TEMPLATE_DROPS,
        RejectReason.TEMPLATE_REWRITES,
        RejectReason.SPAN_UNPROVABLE,
        RejectReason.NO_STOP_TOKEN,
    )
)
_TAG = re.compile(r"(<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\])")
_NOWHERE = Origin(path="", line=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Settings other than the user's: what they do in words, and the row and options that they amount to."""

    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    row: Conversation
    thinking: Thinking
    train_on: TrainOn


class Adviser:
    """Finds settings under which rows are kept.

    Args:
        is_kept: Tells whether a row is, with other values of two settings.
        switches: Variables of the template, the likeliest first.
        thinking: The user's setting.
        train_on: The user's setting.
    """

    def __init__(
        self,
        is_kept: Callable[[Conversation, Thinking, TrainOn], bool],
        *,
        switches: Sequence[str],
        thinking: Thinking,
        train_on: TrainOn,
    ) -> None:
        self._is_kept = is_kept
        self._switches = switches
        self._thinking = thinking
        self._train_on = train_on
        self._known = lru_cache(SAMPLES_KEPT)(self._find)

    def advised(self, row: Conversation, found: Rejected) -> Rejected:
        """Return ``found`` with what would keep ``row``, where something does."""
        if found.reason not in ADVISED:
            return found
        remedy = self._known(_sample(row))
        return replace(found, remedy=remedy) if remedy else found

    def _find(self, row: Conversation) -> str:
        start = Change(row=row, thinking=self._thinking, train_on=self._train_on)
        if self._holds(start):
            return ""  # its words are at fault
        single = list(self._changes(start))
        pairs = (
            both for one in single[::-1] if one.thinking is not self._thinking for both in self._changes(one)
        )
        for change in (*single, *pairs):
            if self._holds(change):
                return with_flags(change.words, change.flags)
        rest = row.messages[1:] if row.messages[0].role == "system" else ()
        changes = [replace(start, row=replace(row, messages=rest))] if rest else []
        changes += [last for change in changes if (last := _last_only(change))]
        return NO_SYSTEM if any(map(self._holds, changes)) else ""

    def _holds(self, change: Change) -> bool:
        return self._is_kept(change.row, change.thinking, change.train_on)

    def _changes(self, start: Change) -> Iterator[Change]:
        """Yield ``start`` with one thing changed, those first that leave the row as it is."""
        own = json.loads(start.row.variables) if start.row.variables else {}
        for name in self._switches:
            for value in () if name in own else (True, False):
                variables = json.dumps({**own, name: value})
                yield replace(
                    start,
                    words=(*start.words, "set a variable of the template"),
                    flags=(*start.flags, f"--template-var {name}={json.dumps(value)}"),
                    row=replace(start.row, variables=variables),
                )
        if start.train_on is TrainOn.ALL and _count_trained(start.row) > 1:
            yield replace(
                start,
                words=(*start.words, "train each answer in a row of its own"),
                flags=(*start.flags, "--train-on each"),
                train_on=TrainOn.EACH,
            )
        if last := _last_only(start):
            yield last
        if start.thinking is not Thinking.DROP and any(map(_thinks, start.row.messages)):
            yield replace(
                start,
                words=(*start.words, "leave the thinking of these rows out"),
                flags=(*start.flags, "--thinking drop"),
                thinking=Thinking.DROP,
            )


def _last_only(start: Change) -> Change | None:
    if start.train_on is TrainOn.LAST or not start.row.messages[-1].trained or _count_trained(start.row) < 2:
        return None
    *before, last = start.row.messages
    messages = (*(replace(message, trained=False) for message in before), last)
    return replace(
        start,
        words=(*start.words, "train the last answer of each row only"),
        flags=(*start.flags, "--train-on last"),
        row=replace(start.row, messages=messages),
        train_on=TrainOn.LAST,
    )


def _count_trained(row: Conversation) -> int:
    return sum(message.trained for message in row.messages)


def _thinks(message: Message) -> bool:
    return find_thinking(message, thinks=True) is not None


def _sample(row: Conversation) -> Conversation:
    """Return ``row`` with other words, which rows alike have in common."""
    messages = tuple(
        replace(
            message,
            content=_other_words(message.content, place),
            thinking=_other_words(message.thinking, place),
        )
        for place, message in enumerate(row.messages)
    )
    return Conversation(messages=messages, origin=_NOWHERE, tools=row.tools, variables=row.variables)


def _other_words(text: str, place: int) -> str:
    """Return ``text`` with its tags and the white space around them, and a word in place of all between."""
    parts = _TAG.split(text)
    for index in range(0, len(parts), 2):
        if inner := parts[index].strip():
            before, _, behind = parts[index].partition(inner)
            parts[index] = f"{before}Text {place}.{index}{behind}"
    return "".join(parts)
