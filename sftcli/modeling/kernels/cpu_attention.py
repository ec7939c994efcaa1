"""Causal attention of a row of documents on a CPU, as one operation.

The backward kernel of torch is the slow part, and for short documents it is several times slower in bfloat16 than in
float32, so that it pays to widen what it reads (``benchmarks/attention.py`` prints both).
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.autograd.function import once_differentiable

from sftcli.runtime import Context

_LONGEST_WIDENED = 384  # tokens of a document up to which the backward pass is faster in float32
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether ``CpuAttention`` does these."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and all(part.stride(-1) == 1 for part in (query, key, value))
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return (1, T, heads, D) for ``query`` (1, heads, T, D), and what ``attend_backward`` needs besides.

    That is for each document the logarithms of what the softmax divides by, (1, heads, n) float32.
    """
    seen = query.new_empty(query.transpose(1, 2).shape)
    weights = []
    for part, *document in split_documents(lengths, seen.transpose(1, 2), query, key, value):
        made, weight = FORWARD(*document, 0.0, True, scale=scale)
        part.copy_(made)
        weights.append(weight)
    return seen, weights


def attend_backward(
    gradient: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seen: torch.Tensor,
    weights: Sequence[torch.Tensor],
    lengths: Sequence[int],
    scale: float | None,
) -> list[torch.Tensor]:
    """Return the gradients of query, key and value in ``parts``, in the layout that (1, T, heads, D) has."""
    made = [part.new_empty(part.transpose(1, 2).shape).transpose(1, 2) for part in parts]
    given = (gradient.transpose(1, 2), *parts, seen.transpose(1, 2))
    for weight, length, document, targets in zip(
        weights, lengths, split_documents(lengths, *given), split_documents(lengths, *made), strict=True
    ):
        if length <= _LONGEST_WIDENED:
            document = [part.float() for part in document]
        results = BACKWARD(*document, weight, 0.0, True, scale=scale)
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)
    return made


class _Kept(Context, Protocol):
    lengths: Sequence[int]
    scale: float | None


class CpuAttention(torch.autograd.Function):
    """Flash attention (Dao 2023, arXiv:2307.08691), document by document, with grouped heads."""

    @staticmethod
    def forward(
        ctx: "_Kept",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Sequence[int],
        scale: float | None,
    ) -> torch.Tensor:
        """Return (1, T, heads, D) for ``query`` (1, heads, T, D); ``key`` and ``value`` may have fewer heads."""
        seen, weights = attend(query, key, value, lengths, scale)
        ctx.save_for_backward(query, key, value, seen, *weights)
        ctx.lengths, ctx.scale = lengths, scale
        return seen

    @staticmethod
    @once_differentiable
    def backward(ctx: "_Kept", gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``query``, ``key`` and ``value``."""
        query, key, value, seen, *weights = ctx.saved_tensors
        lengths, scale = ctx.lengths, ctx.scale
        made = attend_backward(gradient, (query, key, value), seen, weights, lengths, scale)
        return *made, None, None


def split_documents(lengths: Sequence[int], *parts: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield ``parts`` (1, heads, T, D) of one document after the other."""
    pieces = [torch.split(part, list(lengths), dim=2) for part in parts]
    yield from map(list, zip(*pieces, strict=True))
