"""Which process keeps which whole tensors of weights that are shared out, for the part of a checkpoint that it writes."""

from collections.abc import Collection, Mapping
from heapq import heapify, heapreplace

import torch
import torch.distributed as dist

from sftcli.training.distributed.group import Group
from sftcli.training.weights.placement import full_tensor


def owners_of(tensors: Mapping[str, torch.Tensor], processes: int) -> dict[str, int]:
    """Return the rank that keeps each tensor, the same in every process.

    The largest comes first, and each goes to whoever has the fewest numbers by then: so none has more than its share and the
    largest tensor.
    """
    loads = [(0, rank) for rank in range(processes)]
    heapify(loads)
    owners = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        load, rank = loads[0]
        owners[name] = rank
        heapreplace(loads, (load + tensors[name].numel(), rank))
    return owners


def with_held(owners: Mapping[str, int], held: Collection[str], group: Group) -> dict[str, int]:
    """Return ``owners`` with each tensor that some process already holds, ``held`` in this one, left to that process.

    All processes must call it.
    """
    names = sorted(owners)
    ranks = torch.tensor([group.rank if name in held else -1 for name in names], device=group.device)
    dist.all_reduce(ranks, dist.ReduceOp.MAX)
    return {
        name: rank if rank >= 0 else owners[name] for name, rank in zip(names, ranks.tolist(), strict=True)
    }


def gathered(
    tensors: Mapping[str, torch.Tensor], owners: Mapping[str, int], group: Group
) -> dict[str, torch.Tensor]:
    """Return copies on the CPU of those full ``tensors`` that this process keeps.

    All processes must call it with all tensors. They are gathered one at a time, so that a process holds what it keeps and one more.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor.detach())
        if owners[name] == group.rank:
            kept[name] = whole.to("cpu", copy=True)
    return kept
