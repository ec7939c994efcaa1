"""The processes of one training and their collectives. A single process is a group of one, at no cost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(slots=True, kw_only=True)
class Group:
    """This process and its peers; of more than one, the default process group of torch.distributed must be there."""

    rank: int = 0
    size: int = 1
    per_machine: int = (
        0  # processes of each machine, which have consecutive ranks; 0 where that is not so, or not known
    )
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exchanged_bytes: int = 0  # of the gradients that this process gave to be summed

    @property
    def is_writer(self) -> bool:
        """True in the one process that writes and shows."""
        return self.rank == 0

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
        """Yield this process's one of each ``size`` successive items, as often in every process.

        Where the last ones do not reach this process, it gets the first of them, and False: that is another's to count.
        """
        rest = iter(items)
        while turn := list(islice(rest, self.size)):
            own = self.rank < len(turn)
            yield turn[self.rank if own else 0], own

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Return what each process gave, by rank; all are alike in shape and dtype and on the CPU."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found
