"""Which rows make which step: a pure function of seed and step, so that a resumed run needs no cursor but its step."""

from collections.abc import Sequence

import numpy as np

_SHARES = 1_000_000  # the share of text steps is counted in millionths, so that no rounding adds up


class EpochOrder:
    """Every epoch is a seeded permutation, epochs follow without a gap.

    Args:
        count: How many rows there are.
        seed: One part or several.
        keys: Where given, each epoch goes from the lowest to the highest; the seed orders equal ones.
    """

    def __init__(self, count: int, *, seed: Sequence[int], keys: Sequence[float] | None = None) -> None:
        self.count = count
        self.seed = seed
        self.keys = None if keys is None else np.asarray(keys, dtype=np.float64)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, begin: int, end: int) -> list[int]:
        """Return the rows at the places ``begin`` to ``end`` of the endless sequence of epochs."""
        return [self._row(place) for place in range(begin, end)]

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.count)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return int(self._order[index])

    def _order_of(self, epoch: int) -> np.ndarray:
        # RandomState over MT19937 is frozen by numpy's compatibility policy: the order never changes with a release.
        seed = np.random.SeedSequence([self.seed[0], epoch, *self.seed[1:]])
        order = np.random.RandomState(np.random.MT19937(seed)).permutation(self.count)
        return order if self.keys is None else order[np.argsort(self.keys[order], kind="stable")]


class TextSteps:
    """Which steps are taken on pretraining text: ``fraction`` of them, evenly spread; the seed says where the first is."""

    def __init__(self, fraction: float, *, seed: int) -> None:
        self._share = round(fraction * _SHARES)
        self._phase = int(np.random.RandomState(np.random.MT19937(seed)).randint(_SHARES))

    def before(self, step: int) -> int:
        """Return how many of the first ``step`` steps are on text."""
        return (step * self._share + self._phase) // _SHARES

    def is_text(self, step: int) -> bool:
        """Return whether the step after ``step`` finished ones is on text."""
        return self.before(step + 1) > self.before(step)
