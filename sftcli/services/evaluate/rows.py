"""Which held-out rows are answered."""

from collections.abc import Sequence

import numpy as np

from sftcli.data.example import CUT_ANSWERS
from sftcli.data.prepared.store import ExampleTable
from sftcli.errors import DataError
from sftcli.events import EventSink, Notice


def rows_with_whole_answers(heldout: ExampleTable, *, named: str) -> list[int]:
    """Return the held-out rows whose last answer was not cut for its length: an answer can be compared with these alone.

    ``named`` is how a user of the command names other rows.

    Raises:
        DataError: There is none, or a row is pretraining text.
    """
    if any(heldout[row].kind == "text" for row in range(len(heldout))):
        raise DataError(
            "some held-out rows are pretraining text, which has no answer to score",
            hint=f"name rows with prompts and answers with {named}; the loss of a run on its held-out text is in sft show",
        )
    whole = [row for row in range(len(heldout)) if heldout[row].flags.isdisjoint(CUT_ANSWERS)]
    if not whole:
        raise DataError(
            "every held-out answer is truncated, so there is nothing to compare with",
            hint=f"prepare with a larger --max-tokens, or name other rows with {named}",
        )
    return whole


def rows_with_room(heldout: ExampleTable, rows: Sequence[int], positions: int, emit: EventSink) -> list[int]:
    """Return those of ``rows`` that are no longer than the ``positions`` of a model, 0 where it has no limit.

    Raises:
        DataError: There is none.
    """
    lengths = {row: int(heldout.num_tokens[row]) for row in rows}
    found = [row for row, length in lengths.items() if not positions or length <= positions]
    if left := len(rows) - len(found):
        why = f"longer than the {positions:,} positions that the model was made for, up to {max(lengths.values()):,} tokens"
        if not found:
            raise DataError(
                f"every held-out row with a whole answer is {why}", hint=f"--max-tokens {positions} cuts rows"
            )
        emit(Notice(text=f"held-out rows that are {why}: {left:,}; they are not answered"))
    return found


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` row numbers, evenly spread."""
    return [round(row) for row in np.linspace(0, count - 1, num=min(most, count))]
