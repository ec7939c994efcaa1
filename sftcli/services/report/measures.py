"""The measures of a score by name, each with the number of rows that it was computed on: for terminal, page and card alike."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sftcli.figures import change, figure, interval
from sftcli.services.report.evaluation import Evaluation
from sftcli.services.report.score import Interval

Fields = Mapping[str, object]

# What a measure is computed on: every held-out row, those that were answered, or those of them where JSON is expected.
ROWS, ANSWERED, JSON_ROWS = "rows", "answered", "json_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A metric of a score: its name, its key, and the displayed decimals of ``scale`` times its value."""

    label: str
    key: str
    digits: int = 1
    counted: str = ANSWERED
    scale: float = 1.0
    lower_is_better: bool | None = False  # None where neither is, and a difference says nothing


MEASURES = (
    Measure(label="held-out loss (nats/token)", key="loss", digits=3, counted=ROWS, lower_is_better=True),
    Measure(
        label="standard error of the loss",
        key="loss_standard_error",
        digits=3,
        counted=ROWS,
        lower_is_better=None,
    ),
    Measure(label="perplexity", key="perplexity", digits=2, counted=ROWS, lower_is_better=True),
    Measure(label="bits per byte", key="bits_per_byte", digits=3, counted=ROWS, lower_is_better=True),
    Measure(label="token accuracy (%)", key="token_accuracy", counted=ROWS, scale=100.0),
    Measure(label="exact match (%)", key="match_fraction", scale=100.0),
    Measure(label="ROUGE-L", key="rouge_l"),
    Measure(label="chrF", key="chrf"),
    Measure(label="valid JSON (%)", key="json_fraction", counted=JSON_ROWS, scale=100.0),
    Measure(label="answer length (tokens)", key="mean_answer_tokens", lower_is_better=None),
    Measure(label="answers cut short (%)", key="cut_fraction", scale=100.0, lower_is_better=True),
    Measure(label="distinct 2-grams (%)", key="distinct_2", scale=100.0, lower_is_better=None),
    Measure(label="answers that loop (%)", key="looping_fraction", scale=100.0, lower_is_better=True),
    Measure(label="memorized answers (%)", key="memorized_fraction", scale=100.0, lower_is_better=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A measure of the tuned model and of the base, if any, on the same ``rows``."""

    measure: Measure
    base: float | None
    tuned: float
    rows: int  # 0 where an old evaluation does not tell

    @property
    def base_text(self) -> str:
        """The base's number for people."""
        return figure(self.base, self.measure.digits, self.rows)

    @property
    def tuned_text(self) -> str:
        """The tuned model's number for people."""
        return figure(self.tuned, self.measure.digits, self.rows)


def compare_scores(base: Fields | None, tuned: Fields, *, rows: int) -> list[Compared]:
    """Return what was measured of ``tuned``, as ``Score.to_json`` writes it.

    Args:
        base: The score of the base.
        tuned: The score of the tuned model.
        rows: The held-out rows, for scores that do not tell themselves on how many rows their loss is.
    """
    return [
        Compared(
            measure=measure, base=_number(base or {}, measure), tuned=value, rows=_rows(tuned, measure, rows)
        )
        for measure in MEASURES
        if (value := _number(tuned, measure)) is not None
    ]


def has_base(compared: Sequence[Compared]) -> bool:
    """Return whether a base was measured; where none was, tables have no column for it."""
    return any(row.base is not None for row in compared)


def measures_of(evaluation: Evaluation) -> list[Compared]:
    """Return the scores of ``eval.json`` side by side."""
    base = None if evaluation.base is None else evaluation.base.to_json()
    return compare_scores(base, evaluation.tuned.to_json(), rows=evaluation.rows)


def differences_of(
    loss: Interval | None, match: Interval | None, general: Interval | None = None
) -> Iterator[str]:
    """Describe how a tuned model differs from its base in what was compared, with intervals; nothing where nothing was."""
    if loss is not None:
        yield f"loss: {_difference(loss, '', 1.0, 3, other='the base')}"
    if match is not None:
        yield f"exact match: {points_text(match, other='the base')}"
    if general is not None:
        yield f"general text: {_difference(general, ' nats', 1.0, 3, other='the base')}"


def points_text(found: Interval, *, other: str) -> str:
    """Describe a difference of shares in points, with its interval."""
    return _difference(found, " points", 100.0, 1, other=other)


def _difference(found: Interval, unit: str, scale: float, digits: int, *, other: str) -> str:
    low, high = (None if end is None else scale * end for end in (found.low, found.high))
    bounds = interval(low, high, digits, found.rows)
    return f"{change(scale * found.value, digits, found.rows)}{unit} against {other}, {bounds}"


def _number(score: Fields, measure: Measure) -> float | None:
    value = score.get(measure.key)
    return value * measure.scale if isinstance(value, int | float) else None


def _rows(score: Fields, measure: Measure, rows: int) -> int:
    found = score.get(measure.counted) or (rows if measure.counted == ROWS else 0)
    return found if isinstance(found, int) else 0
