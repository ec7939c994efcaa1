"""Rows and what became of them as bytes, for pipes and files: JSON and the bytes of arrays, which run nothing when they are read."""

import json
from dataclasses import fields
from typing import IO

import numpy as np

from sftcli.data.conversations.messages import (
    Conversation,
    Message,
    PlainText,
    Rejected,
    RejectReason,
    TokenRow,
)
from sftcli.data.example import Example, RowFlag, TooLong
from sftcli.data.quality.duplicates import HASHES, Marks
from sftcli.data.reading.record import Origin
from sftcli.services.prepare.rendering import RenderedBatch

_LENGTH_BYTES = 8
_KINDS = {
    kind.__name__: kind for kind in (Conversation, Message, PlainText, TokenRow, Rejected, TooLong, Origin)
}
_NAMES = {name: tuple(field.name for field in fields(kind)) for name, kind in _KINDS.items()}
_PLAIN_FIELDS = tuple(
    field.name for field in fields(Example) if field.name not in {"input_ids", "loss_mask", "origin", "flags"}
)
_IS = "is"  # which of them an object is


def to_bytes(value: object) -> bytes:
    """Return rows and plain values as bytes."""
    return json.dumps(value, default=_fields).encode()


def from_bytes(data: bytes) -> object:
    """Return what ``to_bytes`` was given; lists and tuples inside of a row are tuples."""
    return json.loads(data, object_hook=_made)


def _fields(value: object) -> dict[str, object]:
    kind = type(value).__name__
    return {_IS: kind, **{name: getattr(value, name) for name in _NAMES[kind]}}


def _made(values: dict[str, object]) -> object:
    if _IS not in values:
        return values
    kind = _KINDS[str(values.pop(_IS))]
    if "reason" in values:
        values["reason"] = RejectReason(str(values["reason"]))
    return kind(**{name: tuple(value) if type(value) is list else value for name, value in values.items()})  # type: ignore[arg-type]


def pack(batch: RenderedBatch) -> bytes:
    """Return a batch as bytes."""
    kept = batch.kept
    head = to_bytes(
        {
            "results": [_about(row) if isinstance(row, Example) else row for row in batch.results],
            "prompts": [key.hex() for key in batch.prompts],
            "wholes": [key.hex() for key in batch.wholes],
            "messages": list(batch.messages),
        }
    )
    arrays = [
        *(row.input_ids.tobytes() for row in kept),
        *(row.loss_mask.tobytes() for row in kept),
        batch.marks.keys.tobytes(),
        batch.marks.signatures.tobytes(),
    ]
    return b"".join([len(head).to_bytes(_LENGTH_BYTES, "big"), head, *arrays])


def unpack(data: bytes) -> RenderedBatch:
    """Return the batch that ``pack`` was given."""
    begin = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    head = from_bytes(data[_LENGTH_BYTES:begin])
    assert isinstance(head, dict)
    count = sum(not isinstance(row, Rejected) for row in head["results"])
    tokens = sum(row[0] for row in head["results"] if not isinstance(row, Rejected))
    ids = np.frombuffer(data, np.int32, tokens, begin)
    mask = np.frombuffer(data, np.bool_, tokens, begin + 4 * tokens)
    keys = np.frombuffer(data, np.uint64, count, begin + 5 * tokens).copy()
    signatures = np.frombuffer(data, np.uint16, count * HASHES, begin + 5 * tokens + 8 * count).copy()
    results, at = list[Example | Rejected](), 0
    for row in head["results"]:
        if isinstance(row, Rejected):
            results.append(row)
            continue
        length, path, line, flags, *plain = row
        results.append(
            Example(
                input_ids=ids[at : at + length].copy(),  # a view would keep the whole batch
                loss_mask=mask[at : at + length].copy(),
                origin=Origin(path=path, line=line),
                flags=frozenset(map(RowFlag, flags)),
                **dict(zip(_PLAIN_FIELDS, plain, strict=True)),
            )
        )
        at += length
    return RenderedBatch(
        results=results,
        prompts=[bytes.fromhex(key) for key in head["prompts"]],
        wholes=[bytes.fromhex(key) for key in head["wholes"]],
        marks=Marks(keys=keys, signatures=signatures.reshape(count, HASHES)),
        messages=head["messages"],
    )


def _about(row: Example) -> tuple[object, ...]:
    """Return an example without its arrays."""
    plain = (getattr(row, name) for name in _PLAIN_FIELDS)
    return len(row.input_ids), row.origin.path, row.origin.line, sorted(row.flags), *plain


def framed(data: bytes) -> bytes:
    """Return ``data`` behind its length."""
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


def read_framed(file: IO[bytes]) -> bytes:
    """Return the next piece that was written with its length.

    Raises:
        EOFError: There is none, or no whole one.
    """
    size = int.from_bytes(head := file.read(_LENGTH_BYTES), "big")
    data = file.read(size)
    if len(head) < _LENGTH_BYTES or len(data) < size:
        raise EOFError
    return data
