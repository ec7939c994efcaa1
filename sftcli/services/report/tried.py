"""The base with examples in its prompt beside the tuned model, as ``eval.json`` has them, in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftcli.figures import NOTHING, count, percent, share_of
from sftcli.services.report.measures import points_text

WAYS = {"alone": "no examples", "random": "random examples", "nearest": "nearest examples"}


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


def tried_of(evaluation: Mapping[str, Any]) -> list[ShownWay]:
    """Return the ways of an evaluation; none where the base was asked without examples alone."""
    found = evaluation.get("tried")
    return [*_shown(found)] if isinstance(found, list | tuple) else []


def _shown(ways: Sequence[Mapping[str, Any]]) -> Iterator[ShownWay]:
    for way in ways:
        other = WAYS.get(way["name"])
        named = "tuned, no examples" if other is None else f"base, {other}"
        difference = way["score_difference"] if way["check"] else way["difference"]
        yield ShownWay(
            name=named,
            matched=share_of(way["matched"], way["answered"]),
            check=way["check"],
            score="" if way["score"] is None else percent(way["score"]),
            difference="" if difference is None else points_text(difference, other=named),
            shots=f"{way['mean_shots']:.1f}".removesuffix(".0") if way["mean_shots"] else NOTHING,
            tokens=count(way["mean_prompt_tokens"]),
        )
