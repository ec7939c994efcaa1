"""Rows that ask the same, or nearly so, and are answered otherwise."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sftcli.data.conversations.heldout_split import normalize
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.quality.duplicates import DuplicateFinder, mark_rows
from sftcli.data.reading.record import Origin


def contradictions(
    prompts: Sequence[str], answers: Sequence[str], origins: Sequence[Origin]
) -> dict[int, str]:
    """Return the rows that are answered otherwise than most rows with the same prompt, in words; near copies of it count too.

    Prompts and answers are compared as ``prepare`` compares rows: case and white space do not count.
    """
    finder = DuplicateFinder()
    rows = [
        Conversation(messages=(Message(role="user", content=prompt),), origin=origin)
        for prompt, origin in zip(prompts, origins, strict=True)
    ]
    finder.add(mark_rows(rows), origins, [False] * len(rows))
    repeated = finder.repeated(exact=True, near=True, seed=0)
    groups: Mapping[int, list[int]] = defaultdict(list)
    for row in range(len(rows)):
        groups[_first_of(row, repeated.like)].append(row)
    found: dict[int, str] = {}
    for members in groups.values():
        found |= _minority(members, prompts, answers, origins)
    return found


def _first_of(row: int, like: npt.NDArray[np.int64]) -> int:
    """Return the row that ``row`` repeats, over the rows between them."""
    while like[row] >= 0:
        row = int(like[row])
    return row


def _minority(
    members: Sequence[int], prompts: Sequence[str], answers: Sequence[str], origins: Sequence[Origin]
) -> dict[int, str]:
    said = {row: normalize(answers[row]) for row in members}
    counts = Counter(said.values())
    if len(counts) < 2:
        return {}
    most = max(counts.values())
    usual = {text for text, count in counts.items() if count == most}
    found = {}
    for row in members:
        is_usual = said[row] in usual and len(usual) == 1
        other = next(
            (
                one
                for one in members
                if said[one] != said[row] and origins[one] != origins[row] and said[one] in usual
            ),
            None,
        )
        if is_usual or other is None:
            continue
        is_same = normalize(prompts[row]) == normalize(prompts[other])
        found[row] = (
            f"{origins[other]} asks {'the same' if is_same else 'nearly the same'} and answers otherwise"
        )
    return found
