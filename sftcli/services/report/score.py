"""How one model did on held-out rows, as values."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

TUNED = "tuned"  # way of asking: the tuned model, without examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value, its number of rows, and the bounds of its 95 % interval; none for few rows."""

    value: float
    low: float | None
    high: float | None
    rows: int

    @property
    def excludes_zero(self) -> bool:
        """Whether a value of 0 is outside; of few rows nothing is said."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """How much worse a tuned model predicts general text than its base, in nats per token. ``difference`` is tuned minus base.

    ``version`` is that of the texts; numbers of different ones are not compared. ``kinds`` has the difference by kind of text.
    """

    version: int
    texts: int
    tokens: int
    base: float
    tuned: float
    difference: Interval
    kinds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one model did. Losses are nats per response token; ``*_fraction`` is 0 to 1, ROUGE-L and chrF 0 to 100.

    Sums run over rows in float64, so they do not depend on batches. None means that it was not measured.
    """

    model: str
    rows: int = 0  # that loss, bits per byte and token accuracy are of
    loss: float
    loss_standard_error: float | None = None  # of few rows there is none
    response_tokens: int
    bits_per_byte: float
    token_accuracy: float  # share of response tokens that were the most likely one
    sources: Mapping[str, float] = field(default_factory=dict)  # loss by the file that rows came from
    source_rows: Mapping[str, int] = field(default_factory=dict)  # of each of these
    matched: int
    answered: int  # rows that all below is of
    rouge_l: float | None = None
    chrf: float | None = None
    json_fraction: float | None = None
    json_rows: int = 0  # answered rows where JSON is expected, which ``json_fraction`` is of
    cut: int = 0  # answers that had not ended after ``most_answer_tokens``; what is measured of them is of the beginning
    most_answer_tokens: int = 0
    mean_answer_tokens: float
    mean_expected_tokens: float
    distinct_2: float | None = None
    looping_fraction: float
    longest_copied_tokens: int | None = None
    memorized_fraction: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Return the score with what follows from it."""
        return asdict(self) | {
            "perplexity": self.perplexity,
            "match_fraction": self.match_fraction,
            "cut_fraction": self.cut / max(1, self.answered),
        }

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))  # beyond that a float is full

    @property
    def match_fraction(self) -> float:
        """Share of answered rows that are exactly right."""
        return self.matched / max(1, self.answered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A held-out row that the model got wrong."""

    prompt: str
    expected: str
    answer: str
    origin: str
    cut: bool = False  # the answer had not ended


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredRow:
    """A held-out row with the answers of both models."""

    prompt: str
    expected: str
    base: str | None
    tuned: str
    base_cut: bool = False  # that answer had not ended
    tuned_cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An answered row. ``row`` tells it from others by its content; ``passed`` says by measure whether the answer was right."""

    origin: str
    row: str
    passed: Mapping[str, bool]
    confidence: float = 0.0  # 0 to 1
    logprob: float = 0.0


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
