"""Whether a run learns well, too much, or too little: what its curves say, and what to do about it.

Thresholds and advice stand here for all who judge: the watch over a running training, the report and `eval`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["good", "overfitting", "underfitting", "degrading", "plateau", "spike", "unknown"]

RISE = 0.02  # nats per token of held-out loss above its best that count as rising
HIGH_LOSS = 1.0  # nats per token that the recipe calls high
FLAT = 0.005  # nats per token; a held-out loss that falls by less in several evaluations has come to rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``kind`` with the reason and advice, a sentence each."""

    kind: Kind
    reason: str
    advice: str


def judge(train_losses: Sequence[float], heldout_losses: Sequence[float]) -> Verdict:
    """Judge a run by its training losses per step and its held-out losses, both in order of time."""
    if len(heldout_losses) < 2 or not train_losses:
        return Verdict(
            kind="unknown", reason="there are fewer than two held-out measurements", advice="hold rows out"
        )
    first, best, last = heldout_losses[0], min(heldout_losses), heldout_losses[-1]
    train = mean_of_recent(train_losses)
    if best == first and last > first + RISE:
        return degrading(first, last)
    if last > best + RISE and train < last:
        return overfitting(best, last, train)
    if last > HIGH_LOSS:
        return underfitting(f"held-out loss is still {last:.3f}, above {HIGH_LOSS:g}")
    return Verdict(kind="good", reason=f"held-out loss fell from {first:.3f} to {last:.3f}", advice="")


def mean_of_recent(losses: Sequence[float]) -> float:
    """Return the mean of the newest tenth."""
    recent = losses[-max(1, len(losses) // 10) :]
    return sum(recent) / len(recent)


def overfitting(best: float, last: float, train: float) -> Verdict:
    """Return the verdict on a held-out loss that rises while training loss falls."""
    return Verdict(
        kind="overfitting",
        reason=f"held-out loss rose from {best:.3f} to {last:.3f} while training loss is {train:.3f}",
        advice="reduce steps, increase weight decay, or add more data",
    )


def underfitting(reason: str) -> Verdict:
    """Return the verdict on a loss that stays high."""
    return Verdict(
        kind="underfitting",
        reason=reason,
        advice="train longer, increase the learning rate, or check data quality",
    )


def degrading(first: float, last: float) -> Verdict:
    """Return the verdict on a run that only made the model worse."""
    return Verdict(
        kind="degrading",
        reason=f"held-out loss is {last:.3f}, and was {first:.3f} before training",
        advice="lower the learning rate (1e-5 or less), reduce steps, or mix in pretraining text",
    )


def plateau(evaluations: int, best: float) -> Verdict:
    """Return the verdict on a held-out loss that has come to rest before the end."""
    return Verdict(
        kind="plateau",
        reason=f"held-out loss fell by less than {FLAT:g} in the last {evaluations} evaluations; the best is {best:.3f}",
        advice="more steps may bring nothing: stop (Ctrl-C saves), or set training.early_stopping_evals",
    )


def spike(what: str, value: float, usual: float, rows: str) -> Verdict:
    """Return the verdict on a step far out of line; ``rows`` names what it was made of."""
    return Verdict(
        kind="spike",
        reason=f"{what} jumped to {value:.3g} from about {usual:.3g}; rows {rows}",
        advice="look at these rows; where it comes back, lower the learning rate",
    )
