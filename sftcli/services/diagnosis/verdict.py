"""Whether a run overfits, underfits or learns well, judged by its losses, with advice.

Thresholds and advice stand here for all who judge: the watch over a running training, the report and `eval`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sftcli.figures import are_few, loss_figure, too_few

Kind = Literal["good", "unchanged", "overfitting", "underfitting", "degrading", "plateau", "spike", "unknown"]

RISE = 0.02  # nats per token of held-out loss above its best that count as rising
HIGH_LOSS = 1.0  # nats per token that the recipe calls high
FLAT = 0.005  # nats per token; a held-out loss that falls by less in several evaluations has come to rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``kind`` with the reason and advice, a sentence each."""

    kind: Kind
    reason: str
    advice: str


def judge_losses(train_losses: Sequence[float], heldout_losses: Sequence[float], *, rows: int = 0) -> Verdict:
    """Judge a run by its training losses per step and its held-out losses, both in order of time.

    ``rows`` is how many the held-out losses are of, 0 where it is not known. A verdict from too few of them says so.
    """
    if len(heldout_losses) < 2 or not train_losses:
        return Verdict(
            kind="unknown", reason="there are fewer than two held-out measurements", advice="hold rows out"
        )
    first, best, last = heldout_losses[0], min(heldout_losses), heldout_losses[-1]
    train = mean_of_recent(train_losses)
    if best == first and last > first + RISE:
        return degrading(first, last, rows)
    if last > best + RISE and train < last:
        return overfitting(best, last, train, rows)
    if last > HIGH_LOSS:
        return underfitting(
            f"held-out loss is still {loss_figure(last, rows)}, above {HIGH_LOSS:g}{_doubt(rows)}"
        )
    moved = f"from {loss_figure(first, rows)} to {loss_figure(last, rows)}{_doubt(rows)}"
    if first - last < FLAT:
        return Verdict(
            kind="unchanged",
            reason=f"held-out loss went {moved}, which is almost no change",
            advice="train longer, or increase the learning rate",
        )
    return Verdict(kind="good", reason=f"held-out loss fell {moved}", advice="")


def _doubt(rows: int) -> str:
    return f" ({too_few(rows)} to be sure)" if are_few(rows) else ""


def mean_of_recent(losses: Sequence[float]) -> float:
    """Return the mean of the newest tenth."""
    recent = losses[-max(1, len(losses) // 10) :]
    return sum(recent) / len(recent)


def overfitting(best: float, last: float, train: float, rows: int = 0) -> Verdict:
    """Return the verdict on a held-out loss that rises while training loss falls."""
    return Verdict(
        kind="overfitting",
        reason=f"held-out loss rose from {loss_figure(best, rows)} to {loss_figure(last, rows)}{_doubt(rows)} "
        f"while training loss is {train:.3f}",
        advice="reduce steps, increase weight decay, or add more data",
    )


def underfitting(reason: str) -> Verdict:
    """Return the verdict on a loss that stays high."""
    return Verdict(
        kind="underfitting",
        reason=reason,
        advice="train longer, increase the learning rate, or check data quality",
    )


def degrading(first: float, last: float, rows: int = 0) -> Verdict:
    """Return the verdict on a run that only made the model worse."""
    return Verdict(
        kind="degrading",
        reason=f"held-out loss is {loss_figure(last, rows)}, and was {loss_figure(first, rows)} before training"
        f"{_doubt(rows)}",
        advice="lower the learning rate (1e-5 or less), reduce steps, or mix in pretraining text",
    )


def plateau(evaluations: int, best: float, rows: int = 0) -> Verdict:
    """Return the verdict on a held-out loss that leveled off before the end."""
    return Verdict(
        kind="plateau",
        reason=f"held-out loss fell by less than {FLAT:g} in the last {evaluations} evaluations; "
        f"the best is {loss_figure(best, rows)}{_doubt(rows)}",
        advice="more steps may not help: stop (Ctrl-C saves), or set training.early_stopping_evals",
    )


def spike(what: str, value: float, usual: float, rows: str) -> Verdict:
    """Return the verdict on a loss or gradient spike; ``rows`` names the rows of the step."""
    return Verdict(
        kind="spike",
        reason=f"{what} jumped to {value:.3g} from about {usual:.3g}; rows {rows}",
        advice="check these rows; if it happens again, lower the learning rate",
    )
