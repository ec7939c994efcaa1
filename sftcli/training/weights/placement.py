"""Sharded tensors and their full tensors."""

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
    """Return this process's shard of ``tensor``."""
    return cast("torch.distributed.tensor.DTensor", tensor).to_local()


def rows_of(sharded: torch.Tensor) -> tuple[int, int]:
    """Return which rows of the full tensor this process has of ``sharded``: first one, and the one behind the last.

    The last processes may have none of a small one.
    """
    mesh = cast("torch.distributed.tensor.DTensor", sharded).device_mesh
    shards = mesh.ndim - 1  # the dimension along which it is shared out; before it that of its replicas
    return share_of(sharded.shape[0], mesh.get_local_rank(shards), mesh.size(shards))
