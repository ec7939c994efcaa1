"""Sharded tensors and their full tensors."""

from typing import cast

import torch


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of ``tensor``. Where each process holds a part of it, all of them must ask."""
    # Importing DTensor to ask for it costs a start-up; no other tensor has this method.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast("torch.Tensor", gather())


def placed_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` on the device of ``like``; where ``like`` is shared out, this process's part of it."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return value.to(like.device)
    with torch.no_grad():
        placed = torch.zeros_like(like)
        # Every process has the whole value, so none has to send it; the last ones may have no part of a small one.
        for part in value.chunk(mesh.size())[mesh.get_local_rank() :][:1]:
            local_part(placed).copy_(part)
    return placed


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of ``tensor``, which is shared out, that this process holds."""
    return cast("torch.distributed.tensor.DTensor", tensor).to_local()
