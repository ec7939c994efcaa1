"""How sure a number is: standard errors and paired bootstrap intervals over rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftcli.figures import are_few

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value, the rows that it is of, and the bounds of its 95 % interval; of few rows there are none."""

    value: float
    low: float | None
    high: float | None
    rows: int


def ratio_standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return the standard error of ``sum(sums) / sum(counts)`` over rows, by linearization (Cochran 1977, 6.4).

    A few rows say too little about how rows scatter: None.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    rows = len(values)
    if are_few(rows):
        return None
    residuals = values - values.sum() / weights.sum() * weights
    return float(np.sqrt(rows / (rows - 1) * (residuals**2).sum()) / weights.sum())


def paired_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[int], *, seed: int = 0
) -> Interval:
    """Return ``(sum(second) - sum(first)) / sum(counts)`` with its bootstrap interval; rows are drawn in pairs."""
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    weights = np.asarray(counts, dtype=np.float64)
    value = float(differences.sum() / weights.sum())
    if are_few(len(weights)):
        return Interval(value=value, low=None, high=None, rows=len(weights))
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed])))
    drawn = generator.multinomial(len(weights), np.full(len(weights), 1 / len(weights)), size=RESAMPLES)
    means = (drawn @ differences) / (drawn @ weights)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high), rows=len(weights))
