"""The same answers behind the prompts of other rows.

What an answer costs there says how much its own prompt has to do with it: a right answer costs more behind another prompt, and
one that belongs to another row does not.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sftcli.data.batches.batch import ExampleSource
from sftcli.data.example import Example


class ExchangedRows:
    """The rows of a table, each with the prompt of another one in place of its own; what has loss stays the same.

    The prompt, which is all before the first token with loss, is the one in front of it in the order of length, so that no row
    becomes longer: where it is longer all the same, its beginning is left out. Running text has no prompt and stays as it is.
    """

    def __init__(self, table: ExampleSource) -> None:
        self._table = table
        prompts = [_prompt_of(table[row]).tobytes() for row in range(len(table))]
        self._donors = choose_donors(prompts)
        self._added = [
            min(len(prompts[donor]), len(prompts[row])) - len(prompts[row])
            for row, donor in enumerate(self._donors)
        ]

    @property
    def num_tokens(self) -> Sequence[int]:
        """Length of every row in tokens."""
        lengths = self._table.num_tokens
        return [int(lengths[row]) + added // 4 for row, added in enumerate(self._added)]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int, /) -> Example:
        own = self._table[index]
        first = len(_prompt_of(own))
        prompt = _prompt_of(self._table[self._donors[index]])[-first:] if first else own.input_ids[:0]
        return replace(
            own,
            input_ids=np.concatenate([prompt, own.input_ids[first:]]),
            loss_mask=np.concatenate([np.zeros(len(prompt), np.bool_), own.loss_mask[first:]]),
        )


def choose_donors(prompts: Sequence[bytes]) -> list[int]:
    """Return for each row the row whose prompt it gets: another prompt, no longer where there is one.

    A row that has no other to choose from gets its own.
    """
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row], row))
    donors = list(range(len(prompts)))
    before = next((row for row in order if prompts[row] != prompts[order[0]]), order[0]) if order else 0
    for place, row in enumerate(order):
        if place and prompts[order[place - 1]] != prompts[row]:
            before = order[place - 1]
        donors[row] = before
    return donors


def _prompt_of(example: Example) -> np.ndarray:
    """Return the tokens in front of the first one with loss; none of running text."""
    first = 0 if example.kind == "text" else int(example.loss_mask.argmax())
    return example.input_ids[:first]
