"""Which answers may go out: the cut in the model's own confidence above which few answers are wrong, with its certainty.

The confidence of an answer is the geometric mean of the probabilities of its tokens, ``exp(mean log-probability)``. For each
share of wrong answers in ``WRONG_SHARES`` one cut is chosen by fixed-sequence testing (Angelopoulos et al. 2021,
arXiv:2110.01052): the cuts of a grid that no data chose are tested from the strictest one on, each against the hypothesis that
answers above it are wrong more often than that, by the exact binomial tail, until one is not rejected. The last rejected cut
is the chosen one, and what it says of it holds with probability 0.95 over the held-out rows although those chose it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftcli.services.evaluate.metrics import LEVEL

WRONG_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
FEWEST_ROWS = 50  # of fewer, no answer could go out at a bound that is worth having
_STEPS_A_DECADE, _DECADES = 8, 5
# 0.99999 down to 0.25, and 0, which lets every answer out. It is the same for all data, or the bound would not hold.
GRID = tuple(1 - 10 ** (-step / _STEPS_A_DECADE) for step in range(_STEPS_A_DECADE * _DECADES, -1, -1))
# The first cut that is tested lets this share of the rows out: one wrong answer among too few would end the sequence there.
_FIRST_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The cut for a share of wrong answers; ``confidence`` is None where no cut holds it."""

    wrong_at_most: float
    confidence: float | None
    answered: int  # held-out rows at or above the cut
    right: int  # of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """The cuts of one model over its answers; there are none where the answers are fewer than ``FEWEST_ROWS``."""

    measure: str  # by which an answer is right: "exact match", or a check
    precision: str  # that the answers were computed in: others move the confidence
    model: str  # the folder of the model in its run
    model_hash: str  # of what is in that folder: another model has other confidences
    rows: int  # that were answered
    cuts: tuple[Cut, ...]

    @property
    def choices(self) -> tuple[Cut, ...]:
        """The cuts that exist; of those at one confidence only that with the lowest share of wrong answers."""
        found = {cut.confidence: cut for cut in reversed(self.cuts) if cut.confidence is not None}
        return tuple(reversed(found.values()))


def find_cuts(confidences: Sequence[float], right: Sequence[bool]) -> tuple[Cut, ...]:
    """Return one cut for each of ``WRONG_SHARES``; none at all for fewer than ``FEWEST_ROWS`` rows."""
    if len(right) < FEWEST_ROWS:
        return ()
    values, is_right = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=bool)
    answered = [int((values >= cut).sum()) for cut in GRID]
    kept = [int(is_right[values >= cut].sum()) for cut in GRID]
    return tuple(_find_cut(share, answered, kept) for share in WRONG_SHARES)


def _find_cut(share: float, answered: Sequence[int], right: Sequence[int]) -> Cut:
    first = max(fewest_without_error(share), math.ceil(_FIRST_SHARE * answered[-1]))
    chosen = None
    for place, (rows, kept) in enumerate(zip(answered, right, strict=True)):
        if rows < first:
            continue
        if binomial_tail(rows - kept, rows, share) > 1 - LEVEL:
            break
        chosen = place
    return Cut(
        wrong_at_most=share,
        confidence=None if chosen is None else GRID[chosen],
        answered=0 if chosen is None else answered[chosen],
        right=0 if chosen is None else right[chosen],
    )


def fewest_without_error(share: float) -> int:
    """Return how many answers without a wrong one show that at most ``share`` of them are wrong."""
    return math.ceil(math.log(1 - LEVEL) / math.log1p(-share))


def binomial_tail(wrong: int, rows: int, share: float) -> float:
    """Return the probability of ``wrong`` or fewer wrong answers among ``rows`` where each is wrong with ``share``, 0 to 1."""
    terms = (
        math.lgamma(rows + 1)
        - math.lgamma(count + 1)
        - math.lgamma(rows - count + 1)
        + count * math.log(share)
        + (rows - count) * math.log1p(-share)
        for count in range(wrong + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))
