"""Sharded tensors and their full tensors."""

from collections.abc import Sequence
from typing import cast

import torch

from sftcli.runtime import share_of


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full ``tensor``. If it is sharded, all processes must call it."""
    # Importing DTensor to ask for it costs a start-up; no other tensor has this method.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast("torch.Tensor", gather())


def placed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` on the device of ``like``; if ``like`` is sharded, this process's shard of it."""
    if getattr(like, "device_mesh", None) is None:
        return value.to(like.device)
    with torch.no_grad():
        placed = torch.zeros_like(like)
        begin, end = rows_of(like)
        local_part(placed).copy_(
            value[begin:end]
        )  # every process has the whole value, so none has to send it
    return placed


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of ``tensor``; of one that is not sharded all of it."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast("torch.Tensor", to_local())


def rows_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return which rows of the full ``tensor`` this process has: first one, and the one behind the last.

    The last processes may have none of a small one that is sharded.
    """
    mesh = getattr(tensor, "device_mesh", None)
    length = tensor.shape[0] if tensor.ndim else 1
    if mesh is None:
        return 0, length
    shards = mesh.ndim - 1  # the dimension along which it is shared out; before it that of its replicas
    return share_of(length, mesh.get_local_rank(shards), mesh.size(shards))


def zeros_by_rows(shape: Sequence[int], *, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of ``shape`` where ``like`` is; if that is sharded, shared out along the first dimension as it is."""
    if not hasattr(like, "device_mesh"):
        return torch.zeros(tuple(shape), dtype=dtype, device=like.device)
    from torch.distributed.tensor import DTensor, zeros

    sharded = cast("DTensor", like)
    return zeros(*shape, dtype=dtype, device_mesh=sharded.device_mesh, placements=sharded.placements)
