"""The processes of one training and their collectives. A single process is a group of one, at no cost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sftcli.data.batches.batch import Batch

Item = TypeVar("Item")

# For one exchange: longer than any save. A machine that is gone without a word is missed sooner, by `Pulse`.
EXCHANGE_SECONDS = 3600


@dataclass(slots=True, kw_only=True)
class Group:
    """This process and its peers; of more than one, the default process group of torch.distributed must be there.

    Neighbors may share rows: each of them computes a part of the positions of the same micro-batches.
    """

    rank: int = 0
    size: int = 1
    per_machine: int = (
        0  # processes of each machine, which have consecutive ranks; 0 where that is not so, or not known
    )
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exchanged_bytes: int = 0  # of what this process gave to be summed or, in attention, to be swapped
    parts: int = 1  # processes that share a row
    row_group: "dist.ProcessGroup | None" = None  # of them, where they are several

    @property
    def is_writer(self) -> bool:
        """True in the one process that writes and shows."""
        return self.rank == 0

    @property
    def turns(self) -> int:
        """How many micro-batches are computed at once."""
        return self.size // self.parts

    @property
    def part(self) -> int:
        """Which part of its rows this process computes."""
        return self.rank % self.parts

    def share_rows(self, parts: int) -> None:
        """Let each ``parts`` neighbors share their rows; the number of processes is a multiple of it. All must call it together."""
        self.parts = parts
        for begin in range(0, self.size if parts > 1 else 0, parts):
            ranks = list(range(begin, begin + parts))
            made = dist.new_group(ranks, timeout=timedelta(seconds=EXCHANGE_SECONDS))
            if self.rank in ranks:
                self.row_group = made

    def swap(self, pieces: Tensor) -> Tensor:
        """Return what each process that shares rows with this one gave it: ``pieces`` (parts, N) are what it gives to each."""
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=self.row_group)
        self.exchanged_bytes += pieces.numel() * pieces.element_size()
        return received

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's items: every ``size``-th, so that each has one owner; may be empty."""
        return list(items[self.rank :: self.size])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, of float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Return in every process whether any of them passed true."""
        return self.sum([float(flag)])[0] > 0

    def rounds(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """Yield this process's one of each few successive items, as often in every process; neighbors that share rows get the same.

        Where the last ones do not reach this process, it gets the first of them, and False: that is another's to count.
        """
        rest, place = iter(items), self.rank // self.parts
        while turn := list(islice(rest, self.turns)):
            own = place < len(turn)
            yield turn[place if own else 0], own

    def batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Yield ``rounds`` of ``batches``, of each the part that this process computes."""
        for batch, own in self.rounds(batches):
            yield batch.part(self.part, self.parts), own

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return what each process gave, by rank; all are alike in shape and dtype and on the CPU."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found
