"""What the processes that hold a replica together exchange in an update, for optimizers that need more than their own rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sftcli.runtime import share_of
from sftcli.training.distributed.group import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGroup:
    """The processes that share the rows of each weight out, this one among them. All must call each method, with the same tensors."""

    group: Group  # of the training, which counts bytes
    processes: dist.ProcessGroup

    @property
    def size(self) -> int:
        """How many they are."""
        return self.processes.size()

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return ``numbers``, which become the sums over all processes."""
        dist.all_reduce(numbers, group=self.processes)
        self.group.exchanged_bytes += numbers.nbytes
        return numbers

    def change_whole(
        self,
        rows: Sequence[torch.Tensor],
        shapes: Sequence[torch.Size],
        change: Callable[[torch.Tensor], torch.Tensor],
        *,
        dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """Return this process's rows of what ``change`` makes of each of a few whole tensors, which the processes compute one each.

        Args:
            rows: This process's rows of each tensor; there are at most as many tensors as processes.
            shapes: Of the whole tensors.
            change: Keeps their shape.
            dtype: Of what it returns.
        """
        rank, own = self.processes.rank(), [part.numel() for part in rows]
        is_owner, kept = rank < len(rows), own + [0] * (self.size - len(rows))
        lent = [_numbers_of(shapes[rank], other, self.size) if is_owner else 0 for other in range(self.size)]
        whole = self._swap(torch.cat([part.reshape(-1) for part in rows]), given=kept, taken=lent)
        made = change(whole.view(shapes[rank])).reshape(-1) if is_owner else whole.to(dtype)
        back = self._swap(made, given=lent, taken=kept)
        return [part.view_as(old) for part, old in zip(back.split(own), rows, strict=True)]

    def _swap(self, numbers: torch.Tensor, *, given: Sequence[int], taken: Sequence[int]) -> torch.Tensor:
        """Return what each process gave this one, ``taken`` numbers of it; each gets ``given`` of ``numbers``, by rank."""
        received = numbers.new_empty(sum(taken))
        size = numbers.element_size()
        dist.all_to_all_single(
            received.view(torch.uint8),  # not every backend knows every type
            numbers.view(torch.uint8),
            [size * count for count in taken],
            [size * count for count in given],
            group=self.processes,
        )
        self.group.exchanged_bytes += numbers.nbytes
        return received


def _numbers_of(shape: torch.Size, rank: int, size: int) -> int:
    begin, end = share_of(shape[0], rank, size)
    return (end - begin) * shape[1:].numel()
