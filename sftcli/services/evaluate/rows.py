"""Which held-out rows are answered."""

import numpy as np

from sftcli.data.example import CUT_ANSWERS
from sftcli.data.prepared.store import ExampleTable
from sftcli.errors import DataError


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


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` row numbers, evenly spread."""
    return [round(row) for row in np.linspace(0, count - 1, num=min(most, count))]
