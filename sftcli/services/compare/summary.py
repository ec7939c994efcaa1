"""From the scores of all runs to one line a value, with intervals, and to what follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log

import numpy as np
import numpy.typing as npt

from sftcli.errors import DataError
from sftcli.services.compare.axis import Axis, Measure
from sftcli.services.compare.record import RowScores
from sftcli.services.evaluate.metrics import paired_difference
from sftcli.services.report.score import Interval

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueResult:
    """A value of the axis.

    Attributes:
        value: As it was typed.
        runs: Paths of its runs.
        train_rows: That its first run was trained on.
        score: Held-out loss in nats per token, or bits per byte, the mean over seeds; None where a run diverged.
        by_seed: The same of each seed.
        difference: To the best value, or to the first where that is the baseline; None for that one, and where a run diverged.
        seconds: All its runs took.
        diverged: What was said of a run that diverged; "" for none.
    """

    value: str
    runs: tuple[str, ...]
    train_rows: int
    score: float | None
    by_seed: tuple[float, ...]
    difference: Interval | None
    seconds: float
    diverged: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """What a comparison has found.

    Attributes:
        folder: Where it is kept.
        axis: The settings key, or the word for it.
        measure: What was measured: ``loss`` or ``bits_per_byte``.
        steps: Of each run.
        seeds: Of each value.
        heldout_rows: That all were measured on.
        left_out_rows: Held-out rows that some of the models cannot take.
        values: In the order that they were typed.
        reference: The value that the others are compared with.
        pick: The best value, if it is better than each other one by more than chance.
        close: Otherwise those that may as well be the best, the best first.
        doubling: Where shares of rows are compared: what is added to the loss by twice the rows, by a line through all.
        noise: Where sources are left out in turn: those whose loss on the rows of the others falls without them.
    """

    folder: str
    axis: str
    measure: Measure
    steps: int
    seeds: int
    heldout_rows: int
    left_out_rows: int
    values: tuple[ValueResult, ...]
    reference: str
    pick: str | None
    close: tuple[str, ...]
    doubling: Interval | None
    noise: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the report as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """All scores on the rows that every run has: ``sums`` (values, seeds, rows) and ``counts`` (rows,).

    Sums are in nats and counts in tokens, or bits and bytes. A run that diverged has NaN.
    """

    ids: tuple[str, ...]
    sums: Floats
    counts: Floats
    left_out: int

    def by_seed(self) -> Floats:
        """Return the measure of each value and seed."""
        found: Floats = self.sums.sum(axis=2) / self.counts.sum()
        return found

    def difference(self, first: int, second: int, rows: npt.NDArray[np.bool_] | None = None) -> Interval:
        """Return how much higher the measure of the value ``second`` is, on some ``rows`` or all."""
        taken = np.ones(len(self.ids), dtype=bool) if rows is None else rows
        return paired_difference(self.sums[first][:, taken], self.sums[second][:, taken], self.counts[taken])


def gather(runs: Sequence[Sequence[RowScores | None]], measure: Measure) -> Scores:
    """Return the scores of ``runs``, by value and seed, on the rows that all have; None is a run that diverged.

    Where the models have different tokenizers, some rows may be too long for one of them. A row's bytes are those of the longest of
    its decodings: a tokenizer that cannot write a character gains nothing by that.

    Raises:
        DataError: No two runs can be compared.
    """
    there = [run for of_value in runs for run in of_value if run is not None]
    common = set.intersection(*(set(run.ids) for run in there)) if there else set()
    if not common:
        raise DataError("no run was scored, so there is nothing to compare; all have diverged?")
    ids = tuple(one for one in there[0].ids if one in common)
    sums = np.full((len(runs), len(runs[0]), len(ids)), np.nan)
    tokens, num_bytes = np.zeros(len(ids)), np.zeros(len(ids))
    for value, of_value in enumerate(runs):
        for seed, run in enumerate(of_value):
            if run is None:
                continue
            places = {one: place for place, one in enumerate(run.ids)}
            order = [places[one] for one in ids]
            sums[value, seed] = np.asarray(run.nll)[order]
            tokens = np.asarray(run.tokens, dtype=np.float64)[order]
            num_bytes = np.maximum(num_bytes, np.asarray(run.num_bytes, dtype=np.float64)[order])
    left_out = max(len(run.ids) for run in there) - len(ids)
    if measure is Measure.BITS:
        return Scores(ids=ids, sums=sums / log(2), counts=num_bytes, left_out=left_out)
    return Scores(ids=ids, sums=sums, counts=tokens, left_out=left_out)


def doubling(scores: Scores, train_rows: Sequence[int]) -> Interval | None:
    """Return the slope of the least-squares line of the loss over log2 of the rows, with its interval; None without two sizes.

    The slope is a weighted sum of the losses, so the same weights make one of each row, and rows and seeds are drawn as ever.
    """
    sizes = np.log2(np.asarray(train_rows, dtype=np.float64))
    spread = sizes - sizes.mean()
    if not spread.any() or np.isnan(scores.sums).any():
        return None
    weights = spread / (spread**2).sum()
    slopes = np.einsum("v,vsr->sr", weights, scores.sums)
    return paired_difference(np.zeros_like(slopes), slopes, scores.counts)


def summarize(
    axis: Axis, runs: Sequence[Sequence[RowScores | None]], paths: Mapping[str, Sequence[str]]
) -> tuple[Scores, tuple[Interval | None, ...], int]:
    """Return the scores, the difference of each value to the reference, and the place of that one.

    Where sources are left out, the difference is on the held-out rows of the other sources: what a source does to itself says
    nothing of whether it is noise.
    """
    scores = gather(runs, axis.measure)
    means = scores.by_seed().mean(axis=1)
    if np.isnan(means).all():
        raise DataError("a run of every value has diverged, so there is nothing to compare")
    reference = 0 if axis.kind.has_baseline else int(np.nanargmin(means))
    differences: list[Interval | None] = []
    for place, value in enumerate(axis.values):
        if place == reference or np.isnan(means[[place, reference]]).any():
            differences.append(None)
            continue
        rows = _rows_of_others(scores, value.setting, paths) if axis.kind.has_baseline else None
        is_any = rows is None or rows.any()
        differences.append(scores.difference(reference, place, rows) if is_any else None)
    return scores, tuple(differences), reference


def _rows_of_others(
    scores: Scores, left_out: object, paths: Mapping[str, Sequence[str]]
) -> npt.NDArray[np.bool_]:
    assert isinstance(left_out, tuple)
    own = {path for name in left_out for path in paths.get(name, ())}
    return np.array([one.rpartition(":")[0] not in own for one in scores.ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from the differences; fields as in ``CompareReport``."""

    pick: str | None
    close: tuple[str, ...]
    noise: tuple[str, ...]


def judge(axis: Axis, differences: Sequence[Interval | None], reference: int) -> Verdict:
    """Return which value is the best, or which sources are noise."""
    texts = [value.text for value in axis.values]
    if axis.kind.has_baseline:
        return Verdict(
            pick=None,
            close=(),
            noise=tuple(
                text.removeprefix("without ")
                for text, found in zip(texts, differences, strict=True)
                if found is not None and found.value < 0 and found.excludes_zero
            ),
        )
    rivals = [
        (found.value, text)
        for text, found in zip(texts, differences, strict=True)
        if found is not None and not found.excludes_zero
    ]
    close = (texts[reference], *(text for _, text in sorted(rivals))) if rivals else ()
    return Verdict(pick=None if close else texts[reference], close=close, noise=())


def report_of(
    axis: Axis,
    runs: Sequence[Sequence[RowScores | None]],
    *,
    folder: str,
    names: Sequence[Sequence[str]],
    paths: Mapping[str, Sequence[str]],
    steps: int,
    diverged: Mapping[str, str],
) -> CompareReport:
    """Return what was found; ``names`` are those of the runs, by value and seed."""
    scores, differences, reference = summarize(axis, runs, paths)
    by_seed, verdict = scores.by_seed(), judge(axis, differences, reference)
    results = []
    for place, value in enumerate(axis.values):
        there = [run for run in runs[place] if run is not None]
        is_whole = len(there) == len(runs[place])
        results.append(
            ValueResult(
                value=value.text,
                runs=tuple(f"{folder}/{name}" for name in names[place]),
                train_rows=there[0].train_rows if there else 0,
                score=float(by_seed[place].mean()) if is_whole else None,
                by_seed=tuple(map(float, by_seed[place])),
                difference=differences[place],
                seconds=sum(run.seconds for run in there),
                diverged=next((diverged[name] for name in names[place] if name in diverged), ""),
            )
        )
    is_of_rows = axis.kind.word == "rows"
    return CompareReport(
        folder=folder,
        axis=axis.name,
        measure=axis.measure,
        steps=steps,
        seeds=len(runs[0]),
        heldout_rows=len(scores.ids),
        left_out_rows=scores.left_out,
        values=tuple(results),
        reference=axis.values[reference].text,
        pick=verdict.pick,
        close=verdict.close,
        doubling=doubling(scores, [result.train_rows for result in results]) if is_of_rows else None,
        noise=verdict.noise,
    )
