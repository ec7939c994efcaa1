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
    loss: float
    loss_standard_error: float
    response_tokens: int
    bits_per_byte: float
    token_accuracy: float  # share of response tokens that were the most likely one
    sources: Mapping[str, float]  # loss by the file that rows came from
    matched: int
    answered: int
    rouge_l: float | None
    chrf: float | None
    json_fraction: float | None
    mean_answer_tokens: float
    mean_expected_tokens: float
    distinct_2: float
    looping_fraction: float
    longest_copied_tokens: int
    memorized_fraction: float
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Return the score with what follows from it."""
        return asdict(self) | {"perplexity": self.perplexity, "match_fraction": self.match_fraction}

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))  # beyond that a float is full

    @property
    def match_fraction(self) -> float:
        """Share of answered rows that are exactly right."""
        return self.matched / self.answered

    def measures(self) -> dict[str, tuple[float | None, bool]]:
        """Return numbers for people by name, each with whether lower is better."""
        percent = None if self.json_fraction is None else 100 * self.json_fraction
        return {
            "held-out loss (nats/token)": (self.loss, True),
            "standard error of the loss": (self.loss_standard_error, True),
            "perplexity": (self.perplexity, True),
            "bits per byte": (self.bits_per_byte, True),
            "token accuracy (%)": (100 * self.token_accuracy, False),
            "exact match (%)": (100 * self.match_fraction, False),
            "ROUGE-L": (self.rouge_l, False),
            "chrF": (self.chrf, False),
            "valid JSON (%)": (percent, False),
            "answer length (tokens)": (self.mean_answer_tokens, True),
            "distinct 2-grams (%)": (100 * self.distinct_2, False),
            "answers that loop (%)": (100 * self.looping_fraction, True),
            "memorized answers (%)": (100 * self.memorized_fraction, True),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A held-out row that the model got wrong."""

    prompt: str
    expected: str
    answer: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out row with the answers of both models."""

    prompt: str
    expected: str
    base: str | None
    tuned: str
