"""Pairs of what two runs have."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

One = TypeVar("One")


def pairs_by(
    key: Callable[[One], Hashable], first: Sequence[One], second: Sequence[One]
) -> Iterator[tuple[One, One]]:
    """Yield those of ``first`` and ``second`` with an equal ``key``, in the order of the second; of several the first with the first."""
    waiting: dict[Hashable, list[One]] = {}
    for one in reversed(first):
        waiting.setdefault(key(one), []).append(one)
    for one in second:
        if waiting.get(key(one)):
            yield waiting[key(one)].pop(), one
