"""How one model did on held-out rows, as values."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one model did. Losses are nats per response token; ``*_fraction`` is 0 to 1, ROUGE-L and chrF 0 to 100.

    Sums run over rows in float64, so they do not depend on batches. None means that it was not measured.
    """

    model: str
    rows: int  # that loss, bits per byte and token accuracy are of
    loss: float
    loss_standard_error: float | None  # of few rows there is none
    response_tokens: int
    bits_per_byte: float
    token_accuracy: float  # share of response tokens that were the most likely one
    sources: Mapping[str, float]  # loss by the file that rows came from
    source_rows: Mapping[str, int]  # of each of these
    matched: int
    answered: int  # rows that all below is of
    rouge_l: float | None
    chrf: float | None
    json_fraction: float | None
    json_rows: int  # answered rows where JSON is expected, which ``json_fraction`` is of
    cut: int  # answers that had not ended after ``most_answer_tokens``; what is measured of them is of the beginning
    most_answer_tokens: int
    mean_answer_tokens: float
    mean_expected_tokens: float
    distinct_2: float | None
    looping_fraction: float
    longest_copied_tokens: int | None
    memorized_fraction: float | None
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Return the score with what follows from it."""
        return asdict(self) | {
            "perplexity": self.perplexity,
            "match_fraction": self.match_fraction,
            "cut_fraction": self.cut / self.answered,
        }

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))  # beyond that a float is full

    @property
    def match_fraction(self) -> float:
        """Share of answered rows that are exactly right."""
        return self.matched / self.answered


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
