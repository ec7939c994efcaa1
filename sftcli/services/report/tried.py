"""The base with examples in its prompt beside the tuned model, as ``eval.json`` has them, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from sftcli.figures import NOTHING, count, percent, share_of
from sftcli.services.report.measures import points_text
from sftcli.services.report.score import Interval

TUNED = "tuned"
WAYS = {"alone": "no examples", "random": "random examples", "nearest": "nearest examples"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedWay:
    """A way of asking and what came of it, on the rows that can be asked in every way. Differences are the tuned model minus it."""

    name: str  # that of ``Way`` for the base; ``TUNED`` for the tuned model, which is asked alone
    model: str
    answered: int
    matched: int
    difference: Interval | None  # of the share answered exactly right; None of the tuned model itself
    check: str  # "" where there is none
    score: float | None  # by the check, 0 to 1
    score_difference: Interval | None
    mean_shots: float
    mean_prompt_tokens: float
    cut: int  # answers that had not ended
    seconds: float | None  # None where the evaluation asks this way in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownWay:
    """A way of asking, in words; ``score`` and ``check`` are empty where no check fits."""

    name: str
    matched: str
    check: str
    score: str
    difference: str  # of the tuned model against it, by the check where there is one; "" of itself
    shots: str
    tokens: str


def tried_of(ways: Sequence[TriedWay]) -> list[ShownWay]:
    """Return the ways of an evaluation; none where the base was asked without examples alone."""
    return [*map(_shown, ways)]


def _shown(way: TriedWay) -> ShownWay:
    other = WAYS.get(way.name)
    named = "tuned, no examples" if other is None else f"base, {other}"
    difference = way.score_difference if way.check else way.difference
    return ShownWay(
        name=named,
        matched=share_of(way.matched, way.answered),
        check=way.check,
        score="" if way.score is None else percent(way.score),
        difference="" if difference is None else points_text(difference, other=named),
        shots=f"{way.mean_shots:.1f}".removesuffix(".0") if way.mean_shots else NOTHING,
        tokens=count(way.mean_prompt_tokens),
    )
