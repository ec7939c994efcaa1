"""Conversations as rows of the messages format, which this program reads back as they are."""

import json
from dataclasses import replace
from itertools import chain, pairwise, repeat

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import Schema
from sftcli.data.conversations.formats import RowFormat
from sftcli.data.conversations.keys.meaning import UnreadError
from sftcli.data.conversations.messages import Conversation, Message, PlainText, TokenRow
from sftcli.data.reading.record import Origin, RawRecord


def messages_line(row: Conversation | PlainText | TokenRow) -> str:
    """Return ``row`` as a line of JSON; empty for tokens, and where what is read from that would be another conversation.

    A running text is a row with ``text``. The score of a row, where it has one, stands in ``score``.
    """
    if isinstance(row, TokenRow):
        return ""
    fields = _text_fields(row) if isinstance(row, PlainText) else _fields(row)
    line = json.dumps(fields, ensure_ascii=False)
    kind = RowFormat.MESSAGES if isinstance(row, Conversation) else RowFormat.TEXT
    return line if _read(line, row.origin, kind) == _bare(row) else ""


def read_line(line: str, origin: Origin) -> Conversation:
    """Return the conversation that ``messages_line`` made ``line`` of, without its score."""
    read = _read(line, origin, RowFormat.MESSAGES)
    assert isinstance(read, Conversation)  # else there is no such line
    return read


def _read(line: str, origin: Origin, kind: RowFormat) -> object:
    """Return what this program reads from ``line``; None where it refuses it."""
    record = RawRecord(fields=json.loads(line), origin=origin)
    schema = Schema(format=kind, columns=(), ignored=(), first=origin, renames={})
    try:
        (read,) = to_conversations(record, schema, train_on=TrainOn.ALL)
    except UnreadError:
        return None
    return read


def _text_fields(row: PlainText) -> dict[str, object]:
    return {"text": row.text}


def _fields(row: Conversation) -> dict[str, object]:
    fields: dict[str, object] = {"messages": [_turn(message) for message in row.messages]}
    if row.tools:
        fields["tools"] = json.loads(row.tools)
    if row.variables:
        fields["chat_template_kwargs"] = json.loads(row.variables)
    if row.score is not None:
        fields["score"] = row.score
    return fields


def _turn(message: Message) -> dict[str, object]:
    turn: dict[str, object] = {"role": message.role}
    if message.thinking:
        turn["reasoning_content"] = message.thinking
    turn["content"] = _parts(message) if message.without_loss else message.content
    if message.tool_calls:
        turn["tool_calls"] = _calls(message)
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.role == "assistant" and not message.trained:
        turn["weight"] = 0
    return turn


def _parts(message: Message) -> list[dict[str, object]]:
    edges = (0, *message.without_loss, len(message.content))
    texts = [message.content[begin:end] for begin, end in pairwise(edges)]
    return [
        {"type": "text", "text": text} | ({"weight": 0} if number % 2 else {})
        for number, text in enumerate(texts)
        if text
    ]


def _calls(message: Message) -> list[object]:
    """Return the calls with their arguments as the row had them: JSON text where it had that."""
    calls = []
    texts = chain(message.call_texts, repeat(""))
    for call, text in zip(json.loads(message.tool_calls), texts, strict=False):
        calls.append({**call, "function": {**call["function"], "arguments": text}} if text else call)
    return calls


def _bare(row: Conversation | PlainText) -> Conversation | PlainText:
    """Return ``row`` without what the line does not tell: which turns were cut off, how hard it is, and what it was before."""
    return replace(row, num_cut=0, score=None, row="") if isinstance(row, Conversation) else row
