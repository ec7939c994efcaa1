"""Metrics of generated answers: against the expected ones, on their own, and against the training rows.

ROUGE-L comes from ``rouge-score`` and chrF from ``sacrebleu``, the implementations that papers report; both belong to the
extra ``eval``. Everything else needs nothing.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from sftcli.figures import are_few
from sftcli.services.evaluate.checks.json_values import is_json_text
from sftcli.services.report.score import Interval

LOOP_REPEATS = 4  # as many equal pieces in a row are a loop
MAX_LOOP_TOKENS = 32


def has_reference_metrics() -> bool:
    """Return whether the libraries of the extra ``eval`` are installed."""
    return find_spec("rouge_score") is not None and find_spec("sacrebleu") is not None


def rouge_l(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return 100 * float(
        np.mean(
            [
                scorer.score(want, answer)["rougeL"].fmeasure
                for answer, want in zip(answers, expected, strict=True)
            ]
        )
    )


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the corpus chrF2, 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(answers), [list(expected)]).score)


def json_validity(answers: Sequence[str], expected: Sequence[str]) -> tuple[int, int]:
    """Return how many answers are JSON where JSON is expected, and of how many it is."""
    asked = [answer for answer, want in zip(answers, expected, strict=True) if is_json_text(want)]
    return sum(map(is_json_text, asked)), len(asked)


def distinct_fraction(answers: Iterable[Sequence[int]], n: int) -> float | None:
    """Return distinct n-grams over all n-grams of the answers (Li et al. 2016, arXiv:1510.03055); None where there are none."""
    grams = Counter(gram for ids in answers for gram in _grams(ids, n))
    return len(grams) / grams.total() if grams else None


def has_loop(ids: Sequence[int]) -> bool:
    """Return whether the answer ends in a span of up to 32 tokens repeated four times."""
    return any(
        len(ids) >= size * LOOP_REPEATS
        and all(ids[-size * (k + 1) : len(ids) - size * k] == ids[-size:] for k in range(1, LOOP_REPEATS))
        for size in range(1, MAX_LOOP_TOKENS + 1)
    )


class TrainingSpans:
    """The token spans of training answers, indexed by length."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._by_length: dict[int, set[tuple[int, ...]]] = {}

    def longest_copied(self, ids: Sequence[int]) -> int:
        """Return the length of the longest span of ``ids`` that occurs in a training answer."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            if any(gram in self._spans(middle) for gram in _grams(ids, middle)):
                low = middle
            else:
                high = middle - 1
        return low

    def _spans(self, length: int) -> set[tuple[int, ...]]:
        if length not in self._by_length:
            self._by_length[length] = {gram for row in self._rows for gram in _grams(row, length)}
        return self._by_length[length]


def _grams(ids: Sequence[int], n: int) -> Iterable[tuple[int, ...]]:
    return (tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))


RESAMPLES = 2000
LEVEL = 0.95


# How much farther than a bootstrap of so many trainings a 95 % interval reaches: Student's t against the normal quantile, and the
# spread of a sample against that of its resamples.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # from 1 degree of freedom on
MAX_SEEDS = len(_T_975) + 1


def paired_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0
) -> Interval:
    """Return ``(sum(second) - sum(first)) / sum(counts)`` with its bootstrap interval; rows are drawn in pairs.

    Of several trainings ``first`` and ``second`` are (seeds, rows), and the value is the mean over seeds. Seeds are drawn too,
    in pairs; since few of them say little about how seeds scatter, their part is as wide as Student's t makes it.
    """
    differences = np.atleast_2d(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64))
    weights = np.asarray(counts, dtype=np.float64)
    value = float(differences.sum() / weights.sum() / len(differences))
    if are_few(len(weights)):
        return Interval(value=value, low=None, high=None, rows=len(weights))
    drawn = row_draws(len(weights), seed=seed)
    by_seed = (drawn @ differences.T) / (drawn @ weights)[:, None]  # (resamples, seeds)
    means = by_seed.mean(axis=1)
    if (seeds := len(differences)) > 1:
        widening = _T_975[seeds - 2] / 1.96 * math.sqrt(seeds / (seeds - 1))
        parts = row_draws(seeds, seed=seed + 1) / seeds
        means += widening * ((parts * by_seed).sum(axis=1) - means)
    return interval_of(value, means, len(weights))


def row_draws(rows: int, *, seed: int = 0) -> npt.NDArray[np.float64]:
    """Return how often each of ``rows`` is drawn in each bootstrap sample: as many as there are rows, with replacement."""
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed])))
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)


def interval_of(value: float, drawn: npt.NDArray[np.float64], rows: int) -> Interval:
    """Return ``value``, measured on ``rows``, between the bounds of what bootstrap samples gave."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high), rows=rows)
