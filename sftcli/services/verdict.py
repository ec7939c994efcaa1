"""Whether a run learned well, too much, or too little: what its curves say, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RISE = 0.02  # nats per token of held-out loss above its best that count as rising
HIGH_LOSS = 1.0  # nats per token that the recipe calls high


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``kind`` with the reason and advice, a sentence each."""

    kind: Literal["good", "overfitting", "underfitting", "unknown"]
    reason: str
    advice: str


def judge(train_losses: Sequence[float], heldout_losses: Sequence[float]) -> Verdict:
    """Judge a run by its training losses per step and its held-out losses, both in order of time."""
    if len(heldout_losses) < 2 or not train_losses:
        return Verdict(
            kind="unknown", reason="there are fewer than two held-out measurements", advice="hold rows out"
        )
    best, last = min(heldout_losses), heldout_losses[-1]
    recent = train_losses[-max(1, len(train_losses) // 10) :]
    train = sum(recent) / len(recent)
    if last > best + RISE and train < last:
        return Verdict(
            kind="overfitting",
            reason=f"held-out loss rose from {best:.3f} to {last:.3f} while training loss is {train:.3f}",
            advice="reduce steps, increase weight decay, or add more data",
        )
    if last > HIGH_LOSS:
        return Verdict(
            kind="underfitting",
            reason=f"held-out loss is still {last:.3f}, above {HIGH_LOSS:g}",
            advice="train longer, increase the learning rate, or check data quality",
        )
    return Verdict(
        kind="good", reason=f"held-out loss fell from {heldout_losses[0]:.3f} to {last:.3f}", advice=""
    )
