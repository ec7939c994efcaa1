"""Bytes exchanged by the processes of one training in a step, from the shapes of the weights alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
    """Bytes of a step as the collectives see them; over the wire of a process goes ``(N - 1) / N`` of each, or twice that."""

    gathered: int = 0  # weights, made whole by all-gather
    scattered: int = 0  # gradients, given to reduce-scatter
    summed: int = 0  # gradients, given to all-reduce

    def wire_bytes(self, processes: int) -> float:
        """Bytes that each process sends with the ring algorithms; an all-reduce is a reduce-scatter and an all-gather."""
        return (self.gathered + self.scattered + 2 * self.summed) * (processes - 1) / processes


def replicated_traffic(weights: Iterable[Weight]) -> Traffic:
    """Return the traffic of a step with replicated weights: every float32 gradient once."""
    return Traffic(summed=4 * sum(math.prod(weight.shape) for weight in weights if weight.trains))


def sharded_traffic(
    layers: Sequence[Sequence[Weight]],
    root: Sequence[Weight],
    *,
    processes: int,
    micro_batches: int,
    compute_bytes: int,
    exchanges: int = 1,
) -> Traffic:
    """Return the traffic of a step with sharded weights.

    Args:
        layers: Weights of each decoder layer: gathered before its forward pass and again before its backward pass.
        root: All others: gathered once a pass.
        processes: That share them.
        micro_batches: Of each process in the step.
        compute_bytes: Of a number in the precision of the products, in which weights travel.
        exchanges: Of gradients in the step, in float32: 1, or as many as there are micro-batches.
    """
    inner = [weight for layer in layers for weight in layer]
    gathered = 2 * _padded(inner, processes) + _padded(root, processes)
    trained = [weight for weight in (*inner, *root) if weight.trains]
    return Traffic(
        gathered=micro_batches * compute_bytes * gathered,
        scattered=exchanges * 4 * _padded(trained, processes),
    )


def _padded(weights: Iterable[Weight], processes: int) -> int:
    return sum(weight.padded(processes) for weight in weights)
