"""Which slots of a cache are in use, and how long their rows are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

GROWTH = 128  # positions that a slot has at first, and grows by at least


class KVCacheState:
    """Which slots are in use and how long their rows are; shared by the layers of a cache."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.size = 0  # rows in use: slots 0 to size - 1
        self.room = GROWTH  # positions that a slot has
        self.width = 0  # of the longest row, the token of the present step included
        self.counts: list[int] = []  # positions of every row, on the host
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.slots = torch.arange(num_slots, device=device)
        self.positions = torch.arange(GROWTH, device=device)
        self._is_fixed = False

    def grow(self, positions: int) -> bool:
        """Give slots room for ``positions``; return whether they had too little."""
        if positions <= self.room:
            return False
        self.room = max(positions, 2 * self.room)
        self.positions = torch.arange(self.room, device=self.lengths.device)
        return True

    def step(self) -> None:
        """Count one more position of every row."""
        self.lengths[: self.size] += 1
        self.counts = [count + 1 for count in self.counts]

    def add(self, lengths: Sequence[int]) -> None:
        """Count new rows, of ``lengths`` positions, behind the others."""
        self.lengths[self.size : self.size + len(lengths)] = torch.tensor(lengths, device=self.lengths.device)
        self.counts += lengths
        self.size = len(self.counts)

    def drop(self, row: int) -> None:
        """Forget ``row``; the last row takes its number."""
        last = self.size - 1
        self.lengths[row] = self.lengths[last].clone()
        self.lengths[last] = 0
        self.counts[row] = self.counts[last]
        self.counts.pop()
        self.size = last

    @contextmanager
    def fixed(self, rows: int, width: int) -> Iterator[None]:
        """Let the block see so many rows and so many positions of each, and masks that hold for rows of any lengths.

        Slots without a row count as empty ones: what is written there, at their first position, is never looked at.
        """
        before = self.size, self.width
        self.size, self.width, self._is_fixed = rows, width, True
        try:
            yield
        finally:
            (self.size, self.width), self._is_fixed = before, False

    def mask(self, window: int = 0) -> torch.Tensor | None:
        """Return (B, 1, 1, width), true where a row may look, or None where all rows look at everything.

        Args:
            window: How many positions a row sees, its newest included; 0 for all.
        """
        is_full = all(count + 1 == self.width for count in self.counts) and not 0 < window < self.width
        if is_full and not self._is_fixed:
            return None
        positions, lengths = self.positions[: self.width], self.lengths[: self.size, None]
        visible = positions <= lengths
        if window:
            visible &= positions > lengths - window
        return visible[:, None, None]


def added(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores of ``dtype`` so that they count where ``visible`` alone."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill_(~visible, -torch.inf)
