"""Which of the prepared rows are trained on: a seeded, nested share of them, without the sources that are left out.

The store stays as it is, so that runs on different shares have the same held-out rows and one preparation.
"""

from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np

from sftcli.config.schema.data import DataSettings
from sftcli.data.example import Example
from sftcli.data.prepared.store import ExampleTable, PreparedDataset
from sftcli.errors import DataError, Location


class ChosenRows(ExampleTable):
    """Some rows of a table, in its order; nothing is copied.

    Args:
        table: All of them.
        rows: The numbers of those that are chosen, in rising order.
    """

    def __init__(self, table: ExampleTable, rows: Sequence[int]) -> None:
        self._table, self._rows = table, rows
        lengths = table.num_tokens
        self.num_tokens = [lengths[row] for row in rows]

    @property
    def scores(self) -> Sequence[float]:
        """Score of every example; NaN where there is none."""
        scores = self._table.scores
        return [scores[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def ids_from(self, first: int) -> set[int]:
        """Return which tokens with the id ``first`` or a higher one are in some example of the whole table."""
        return self._table.ids_from(first)

    def keys(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield what the whole table does, of the chosen rows."""
        wanted = np.zeros(len(self._table), dtype=bool)
        wanted[list(self._rows)] = True
        return compress(self._table.keys(), wanted)

    def origins(self) -> Sequence[tuple[str, int]]:
        """Return path and line of every example."""
        origins = self._table.origins()
        return [origins[row] for row in self._rows]

    def joined(self, other: ExampleTable) -> ExampleTable:
        """Return a table of these rows and, behind them, those of ``other``; nothing is copied."""
        whole = self._table.joined(other)
        return ChosenRows(whole, [*self._rows, *range(len(self._table), len(whole))])

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._table[self._rows[index]]


def with_subset(dataset: PreparedDataset, data: DataSettings) -> PreparedDataset:
    """Return ``dataset`` with those rows to train on that ``data`` asks for.

    Examples that come from the same place of a file are taken together. Of the places a permutation is drawn with the seed, and
    its beginning is taken: so a smaller share is a part of a larger one.

    Raises:
        DataError: Rows of a source that is left out cannot be told from those of another.
    """
    if data.takes_all:
        return dataset
    origins = dataset.train.origins()
    left_out = _paths_left_out(dataset, data.leave_out)
    places = list(dict.fromkeys(origin for origin in origins if origin[0] not in left_out))
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([data.share_seed])))
    order = generator.permutation(len(places))
    count = max(1, round(data.train_share * len(places)))
    chosen = {places[place] for place in order[:count].tolist()}
    rows = [row for row, origin in enumerate(origins) if origin in chosen]
    return dataset.with_train(ChosenRows(dataset.train, rows))


def _paths_left_out(dataset: PreparedDataset, names: Sequence[str]) -> set[str]:
    known = dataset.about.paths
    found = {path for name in names for path in known.get(name, ())}
    for name, paths in known.items():
        if name not in names and (shared := found.intersection(paths)):
            raise DataError(
                f"{min(shared)} is also a file of the source {name}, so its rows cannot be left out alone",
                location=Location(key="data.leave_out"),
            )
    return found
