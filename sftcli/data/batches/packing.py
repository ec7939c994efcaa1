"""Lengths to packs and groups: pure, and the same on every machine. Knows nothing about what the numbers are lengths of.

Both functions return indices into ``lengths``, each exactly once.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

PASS_POSITIONS = 64  # positions that one more forward and backward pass is worth; see docs/training.md


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill packs of at most ``capacity``: the longest first, each into the fullest pack that has room for it.

    What is longer than ``capacity`` gets a pack of its own.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is left, pack), ascending
    for index in _longest_first(lengths):
        place = bisect_left(rooms, (lengths[index], -1))
        room, pack = rooms.pop(place) if place < len(rooms) else (max(capacity, lengths[index]), len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        insort(rooms, (room - lengths[index], pack))
    return packs


def best_fit_even(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill as many packs as ``best_fit`` does, but to a lower level where that is enough: the fullest takes the memory."""
    packs = best_fit(lengths, capacity)
    lowest = max(*lengths, -(-sum(lengths) // len(packs)), 1)
    while lowest < capacity:
        level = (lowest + capacity) // 2
        lower = best_fit(lengths, level)
        if len(lower) > len(packs):
            lowest = level + 1
        else:
            packs, capacity = lower, level
    return packs


def group_alike(
    lengths: Sequence[int], max_rows: int, *, pass_positions: int = PASS_POSITIONS
) -> list[list[int]]:
    """Cut into groups of at most ``max_rows`` of like length, longest first, so that padding and passes cost least.

    A group costs its rows times its longest one, and ``pass_positions`` for being one more.
    """
    order = _longest_first(lengths)
    costs, begins = [0], [0]  # of the best way to group the first n
    for end in range(1, len(order) + 1):
        cost, begin = min(
            (costs[begin] + (end - begin) * lengths[order[begin]] + pass_positions, begin)
            for begin in range(max(0, end - max_rows), end)
        )
        costs.append(cost)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
