"""Runs side by side: the settings in which they differ, and their scores with the best one marked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sftcli.config.resolve import Resolved
from sftcli.figures import NOTHING, carried, setting_text
from sftcli.services.report.measures import Compared

_NAMES_ONLY = "run."  # what a run is called and where it is kept changes nothing in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a table of runs: a text for each; ``best`` are the numbers of those that did best."""

    name: str
    values: tuple[str, ...]
    best: frozenset[int] = frozenset()


def facts_side_by_side(facts: Sequence[Sequence[tuple[str, str]]]) -> Iterator[Line]:
    """Yield every fact that one of the runs has."""
    by_run = [dict(one) for one in facts]
    for name in dict.fromkeys(name for one in facts for name, _ in one):
        yield Line(name=name, values=tuple(one.get(name, NOTHING) for one in by_run))


def settings_that_differ(runs: Sequence[Resolved]) -> Iterator[Line]:
    """Yield the settings of which not all runs have the same value."""
    for rows in zip(*(run.rows() for run in runs), strict=True):
        values = [row.value for row in rows]
        if not rows[0].key.startswith(_NAMES_ONLY) and any(value != values[0] for value in values):
            yield Line(name=rows[0].key, values=tuple(map(setting_text, values)))


def scores_side_by_side(scores: Sequence[Sequence[Compared]]) -> Iterator[Line]:
    """Yield every measure of the tuned models that one of the runs has.

    The best is marked among at least two, of the same number of rows: of different ones it would be a guess.
    """
    by_run: list[Mapping[str, Compared]] = [{row.measure.label: row for row in one} for one in scores]
    for label in dict.fromkeys(row.measure.label for one in scores for row in one):
        found = {place: one[label] for place, one in enumerate(by_run) if label in one}
        texts = [found[place].tuned_text if place in found else NOTHING for place in range(len(by_run))]
        yield Line(name=label, values=tuple(texts), best=_best(found))


def _best(found: Mapping[int, Compared]) -> frozenset[int]:
    """Return the places of the best; empty where all are the same, or nothing can be said."""
    first = next(iter(found.values()))
    is_lower_better = first.measure.lower_is_better
    if is_lower_better is None or len({row.rows for row in found.values()}) > 1:
        return frozenset()
    shown = {place: round(row.tuned, carried(row.measure.digits, row.rows)) for place, row in found.items()}
    choose: Callable[[Sequence[float]], float] = min if is_lower_better else max
    if len({*shown.values()}) < 2:
        return frozenset()
    best = choose([*shown.values()])
    return frozenset(place for place, value in shown.items() if value == best)
