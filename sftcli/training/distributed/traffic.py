"""Bytes exchanged by the processes of one training in a step, from the shapes of the weights alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sftcli.runtime import share_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Shape of one parameter."""

    shape: tuple[int, ...]
    trains: bool = True

    def padded(self, processes: int) -> int:
        """Numbers in it once its first dimension is filled up to a multiple of ``processes``."""
        first, *rest = self.shape or (1,)
        return -(-first // processes) * processes * math.prod(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of a step as the collectives see them; over the wire of one of N processes goes ``(N - 1) / N`` of each, or twice that."""

    gathered: int = 0  # weights, made whole by all-gather among those that share them out
    scattered: int = 0  # gradients, given to reduce-scatter among the same
    summed: int = 0  # gradients, given to all-reduce among those that hold the same weights
    updated: int = 0  # what the optimizer swaps among those that share the weights out, or lets be summed

    def shard_wire_bytes(self, shards: int) -> float:
        """Bytes that each of ``shards`` processes, which share the weights out, sends the others with the ring algorithms.

        What an optimizer lets be summed is little, and counts once.
        """
        return (self.gathered + self.scattered + self.updated) * (shards - 1) / shards

    def copy_wire_bytes(self, copies: int) -> float:
        """Bytes that each of ``copies`` processes, which hold the same, sends; an all-reduce is a reduce-scatter and an all-gather."""
        return 2 * self.summed * (copies - 1) / copies


def replicated_traffic(weights: Iterable[Weight]) -> Traffic:
    """Return the traffic of a step with replicated weights: every float32 gradient once."""
    return Traffic(summed=4 * sum(math.prod(weight.shape) for weight in weights if weight.trains))


def sharded_traffic(
    layers: Sequence[Sequence[Weight]],
    root: Sequence[Weight],
    *,
    shards: int,
    copies: int = 1,
    micro_batches: int,
    compute_bytes: int,
    exchanges: int = 1,
) -> Traffic:
    """Return the traffic of a step with sharded weights.

    Args:
        layers: Weights of each decoder layer: gathered before its forward pass and again before its backward pass.
        root: All others: gathered once a pass.
        shards: Processes that share them.
        copies: Of the whole of them. More than one sum their shards of the gradients, once in the step.
        micro_batches: Of each process in the step.
        compute_bytes: Of a number in the precision of the products, in which weights travel.
        exchanges: Of gradients in the step, in float32: 1, or as many as there are micro-batches.
    """
    inner = [weight for layer in layers for weight in layer]
    gathered = 2 * _padded(inner, shards) + _padded(root, shards)
    trained = 4 * _padded((weight for weight in (*inner, *root) if weight.trains), shards)
    return Traffic(
        gathered=micro_batches * compute_bytes * gathered,
        scattered=exchanges * trained,
        summed=trained // shards if copies > 1 else 0,
    )


def muon_update_bytes(matrices: Iterable[Weight], *, shards: int, rank: int) -> int:
    """Return what process ``rank`` gives in an update by Muon: its rows in float32, and in bfloat16 what it makes orthogonal.

    The matrices come in the order of the optimizer, as their owners follow from it.
    """
    given = 0
    for place, matrix in enumerate(matrices):
        begin, end = share_of(matrix.shape[0], rank, shards)
        given += 4 * (end - begin) * math.prod(matrix.shape[1:])
        given += 2 * math.prod(matrix.shape) if place % shards == rank else 0
    return given


def adafactor_update_bytes(weights: Iterable[Weight]) -> int:
    """Return what each process gives to be summed in an update by Adafactor: of each weight a norm, of matrices also the sums of columns."""
    return 4 * sum(1 + (weight.shape[1] + 1 if len(weight.shape) == 2 else 0) for weight in weights)


def _padded(weights: Iterable[Weight], shards: int) -> int:
    return sum(weight.padded(shards) for weight in weights)
