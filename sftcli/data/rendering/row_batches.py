"""Rows on their way to tokens, many at a time."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sftcli.data.conversations.convert import Conversation, PlainText, Rejected

Row = Conversation | PlainText | Rejected

ROWS_PER_BATCH = 256
CHARS_PER_BATCH = 2_000_000
COLLECTED_OBJECTS = 20_000  # more than a batch makes


def row_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield ``rows`` in lists of limited length and size."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += num_chars(row)
        if len(batch) >= ROWS_PER_BATCH or size >= CHARS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def num_chars(row: Row) -> int:
    """Return the characters of all contents."""
    match row:
        case Conversation():
            return sum([len(message.content) for message in row.messages])
        case PlainText():
            return len(row.text)
        case Rejected():
            return 0


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for reference cycles so rarely that most objects of a batch are gone before it looks at them."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECTED_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
