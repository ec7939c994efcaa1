"""Attention of rows whose positions are shared out: each process sees all positions with a part of the heads.

This is the exchange of DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509). A process has some positions of all heads; one
swap with its neighbors makes that all positions of some heads, and one behind attention takes it back. So whatever attention a
model has, with windows and documents, runs on whole rows as it is.
"""

from typing import Protocol

import torch

from sftcli.errors import Location, UsageError
from sftcli.runtime import Context, applied

KEY = "training.context_processes"


class Neighbors(Protocol):
    """The processes that share rows."""

    parts: int

    def swap(self, pieces: torch.Tensor) -> torch.Tensor:
        """Return what each process gave to this one; ``pieces`` (parts, N) are what it gives to each."""
        ...


class _Kept(Context, Protocol):
    neighbors: Neighbors


class Swap(torch.autograd.Function):
    """``Neighbors.swap``, whose gradients go the same way back."""

    @staticmethod
    def forward(ctx: "_Kept", pieces: torch.Tensor, neighbors: Neighbors) -> torch.Tensor:
        """Return what each process gave to this one, (parts, N)."""
        ctx.neighbors = neighbors
        return neighbors.swap(pieces.contiguous())

    @staticmethod
    def backward(ctx: "_Kept", gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return to each process the gradient of what it gave."""
        return ctx.neighbors.swap(gradient.contiguous()), None


def by_head(neighbors: Neighbors, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Return the ``parts`` (B, heads, T, D), the first of them queries, as (B, heads of this process, T of all, D).

    Keys and values with too few heads for that are repeated as often as it takes.

    Raises:
        UsageError: The heads of the queries cannot be shared out evenly.
    """
    count, heads = neighbors.parts, parts[0].shape[1]
    if heads % count:
        raise UsageError(
            f"{KEY} is {count}, and attention of this model has {heads} heads, which {count} processes cannot share evenly",
            hint=f"set {KEY} to a number that divides {heads}",
            location=Location(key=KEY),
        )
    rows, positions = parts[0].shape[0], parts[0].shape[2]
    flat = [
        part.repeat_interleave(_times(part.shape[1], heads, count), dim=1)
        .unflatten(1, (count, -1))
        .transpose(0, 1)
        .reshape(count, -1)
        for part in parts
    ]
    received = applied(Swap, torch.cat(flat, dim=1), neighbors).split([piece.shape[1] for piece in flat], 1)
    return [
        piece.view(count, rows, -1, positions, part.shape[3]).permute(1, 2, 0, 3, 4).flatten(2, 3)
        for piece, part in zip(received, parts, strict=True)
    ]


def by_position(neighbors: Neighbors, seen: torch.Tensor) -> torch.Tensor:
    """Return what attention made, (B, T of all, heads of this process, D), as (B, T, heads, D)."""
    count = neighbors.parts
    pieces = seen.unflatten(1, (count, -1)).transpose(0, 1)  # (parts, B, T, heads of this process, D)
    received = applied(Swap, pieces.reshape(count, -1), neighbors).view(pieces.shape)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _times(heads: int, query_heads: int, count: int) -> int:
    """Return how often each of ``heads`` has to be repeated so that ``count`` processes can share them, beside their queries."""
    return next(
        times
        for times in range(1, query_heads + 1)
        if heads * times % count == 0 and query_heads % (heads * times) == 0
    )


def told_parts(arguments: dict[str, object], neighbors: Neighbors | None) -> bool:
    """Take what a pass is told of parts of rows out of its ``arguments``; return whether it has one."""
    parts = arguments.pop("row_parts", 1)
    if parts == 1:
        return False
    if neighbors is None or neighbors.parts != parts:
        raise ValueError(f"a part of rows of {parts} processes for a model that is not told of them")
    return True
