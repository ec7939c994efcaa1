"""Trees of messages to conversations: one for each tree, along the replies that were ranked best.

A tree is written as one message a row, with an id and that of the message it replies to, or as one row with replies inside replies.
Every path to a leaf would be a conversation too, but a prompt with ten answers would be trained ten times over, nine of them on answers that
people found worse. Among replies without a rank the first one is taken.

Rows of one message are held until all are there, since a reply may stand anywhere behind its question, or before it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from sftcli.data.conversations.formats import CHAT_COLUMNS
from sftcli.data.conversations.keys.meaning import BY_KEY, TREE, is_filled, is_told, is_true
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import DataError, Location

MAX_CHARS = 512 * 2**20  # of all messages
_PARENT = "parent_id"
_IDS, _TEXTS = ("message_id", "id"), ("text", "content")
_REPLIES = "replies"
_OWN = frozenset((_PARENT, *_IDS, *_TEXTS, _REPLIES, "role", "rank", "deleted"))

Fields = Mapping[str, object]


@dataclass(slots=True)
class _Message:
    origin: Origin
    parent: str
    turn: dict[str, object]
    rank: float
    is_deleted: bool
    columns: Fields  # of the row, where the message begins a tree
    replies: list[str] = field(default_factory=list)


def joined_trees(
    records: Iterable[RawRecord], *, name: str, dropped: frozenset[str], note: Callable[[str], None]
) -> Iterator[RawRecord]:
    """Yield ``records``; where they hold trees of messages, a record with ``messages`` for each tree instead.

    Args:
        records: Of one source.
        name: Of the source.
        dropped: Keys that are dropped on purpose; without parents there are no trees.
        note: Receives what became of the trees.

    Raises:
        DataError: A message is not one, or the one that it replies to is not there.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        return
    everything = chain((first,), records)
    if _is_message(first.fields) and not first.fields.get(_REPLIES) and _PARENT not in dropped:
        yield from _from_messages(everything, name, note)
    elif _root_of(first.fields) is not None:
        yield from _from_trees(everything, name, note)
    else:
        yield from everything


def _is_message(fields: Fields) -> bool:
    return (
        _PARENT in fields
        and "role" in fields
        and any(name in fields for name in _IDS)
        and any(name in fields for name in _TEXTS)
        and not any(name in fields for name in CHAT_COLUMNS)
    )


def _from_messages(
    records: Iterable[RawRecord], name: str, note: Callable[[str], None]
) -> Iterator[RawRecord]:
    messages = _read_messages(records)
    roots = _linked(messages)
    paths = [path for root in roots if (path := _path(root, messages))]
    answered = [path for path in paths if _has_answer(message.turn for message in path)]
    ranked = any(math.isfinite(message.rank) for message in messages.values())
    used = sum(map(len, answered))
    note(
        f"{name}: {len(messages)} messages in {len(roots)} trees: a conversation each, along the"
        f" {'best-ranked' if ranked else 'first'} replies; left out: {len(messages) - used} messages"
        f" beside them, {len(roots) - len(answered)} trees without an answer"
    )
    for path in answered:
        turns = [message.turn for message in path]
        yield RawRecord(fields={**path[0].columns, "messages": turns}, origin=path[0].origin)


def _read_messages(records: Iterable[RawRecord]) -> dict[str, _Message]:
    messages = dict[str, _Message]()
    size = 0
    for record in records:
        own, message = _message(record)
        if own in messages:
            raise _error(
                record.origin, f"the message {own!r} is there twice, first in {messages[own].origin}"
            )
        messages[own] = message
        size += len(str(message.turn["content"]))
        if size > MAX_CHARS:
            raise _error(
                record.origin,
                f"messages of more than {MAX_CHARS // 2**20} million characters are not joined to conversations",
                'write the turns of each conversation into one row: {"messages": [...]}',
            )
    return messages


def _message(record: RawRecord) -> tuple[str, _Message]:
    fields = record.fields
    own = next((fields[name] for name in _IDS if is_filled(fields.get(name))), None)
    text = next((fields[name] for name in _TEXTS if name in fields), None)
    if not _is_message(fields) or not isinstance(own, str | int):
        raise _error(
            record.origin,
            "the row is no message of a tree, as those before it are: it lacks an id, a parent, a role or a text",
        )
    if fields.get(_REPLIES):
        raise _error(record.origin, "the row is a message with replies inside, and those before it have none")
    parent = fields[_PARENT]
    is_root = not is_filled(parent)
    return str(own), _Message(
        origin=record.origin,
        parent="" if is_root else str(parent),
        turn=_turn(fields, text),
        rank=_rank(fields),
        is_deleted=is_true(fields.get("deleted")),
        columns={key: value for key, value in fields.items() if key not in _OWN and key not in BY_KEY}
        if is_root
        else {},
    )


def _turn(fields: Fields, text: object) -> dict[str, object]:
    """Return a message as a turn, with what it says beside its text."""
    said = {
        key: fields[key] for key in fields if key in BY_KEY and key not in TREE.keys and is_told(fields[key])
    }
    return {**said, "role": fields.get("role"), "content": text}


def _rank(fields: Fields) -> float:
    rank = fields.get("rank")
    return rank if isinstance(rank, int | float) and rank == rank else math.inf


def _linked(messages: Mapping[str, _Message]) -> list[_Message]:
    """Give each message its replies, and return those that begin a tree.

    Raises:
        DataError: A message replies to one that is not there.
    """
    lost = [own for own, message in messages.items() if message.parent and message.parent not in messages]
    if lost:
        first = messages[lost[0]]
        raise _error(
            first.origin,
            f"the message {lost[0]!r} replies to {first.parent!r}, which is not there"
            f" ({len(lost)} of {len(messages)} messages)",
            "name the whole file: in a part or a sample of it, conversations lack their beginning",
        )
    for own, message in messages.items():
        if message.parent:
            messages[message.parent].replies.append(own)
    roots = [message for message in messages.values() if not message.parent]
    reached, pending = 0, list(roots)
    while pending:
        reached += 1
        pending += [messages[own] for own in pending.pop().replies]
    if reached < len(messages):
        first = next(iter(messages.values()))
        raise _error(
            first.origin,
            f"{len(messages) - reached} of {len(messages)} messages reply to each other in a circle",
        )
    return roots


def _path(root: _Message, messages: Mapping[str, _Message]) -> list[_Message]:
    """Return the messages from ``root`` to a leaf, along the best replies; none where the root was deleted."""
    path = [] if root.is_deleted else [root]
    while path:
        replies = [messages[own] for own in path[-1].replies if not messages[own].is_deleted]
        if not replies:
            break
        path.append(min(replies, key=lambda reply: reply.rank))
    return path


def _has_answer(turns: Iterable[object]) -> bool:
    return any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in turns)


# Trees in one row


def _root_of(fields: Fields) -> Fields | None:
    """Return the first message of the tree in a row; None where it holds none."""
    for root in (fields, fields.get("prompt")):
        if (
            isinstance(root, Mapping)
            and isinstance(root.get(_REPLIES), list)
            and "role" in root
            and any(name in root for name in _TEXTS)
        ):
            return root
    return None


def _from_trees(records: Iterable[RawRecord], name: str, note: Callable[[str], None]) -> Iterator[RawRecord]:
    trees = without = 0
    for record in records:
        root = _root_of(record.fields)
        if root is None:
            raise _error(record.origin, "the row holds no tree of messages, as those before it do")
        turns, trees = _best_turns(root), trees + 1
        if not _has_answer(turns):
            without += 1
            continue
        columns = {
            key: value
            for key, value in record.fields.items()
            if value is not root and not (root is record.fields and (key in _OWN or key in BY_KEY))
        }
        yield RawRecord(fields={**columns, "messages": turns}, origin=record.origin)
    note(
        f"{name}: {trees} trees: a conversation each, along the best-ranked replies, or the first;"
        f" left out: {without} trees without an answer"
    )


def _best_turns(root: Fields) -> Sequence[object]:
    turns: list[object] = []
    node: object = root
    while isinstance(node, Mapping) and not is_true(node.get("deleted")):
        turns.append(_turn(node, next((node[name] for name in _TEXTS if name in node), None)))
        replies = node.get(_REPLIES)
        kept = [reply for reply in replies if _is_kept(reply)] if isinstance(replies, list) else []
        node = min(kept, key=_rank_of, default=None)
    return turns if node is None else [*turns, node]  # what is no message is refused where turns are read


def _is_kept(reply: object) -> bool:
    return not (isinstance(reply, Mapping) and is_true(reply.get("deleted")))


def _rank_of(reply: object) -> float:
    return _rank(reply) if isinstance(reply, Mapping) else -math.inf


def _error(origin: Origin, what: str, hint: str = "") -> DataError:
    return DataError(f"{origin}: {what}", hint=hint, location=Location(file=origin.path, line=origin.line))
