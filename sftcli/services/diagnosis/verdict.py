"""Whether a run overfits or learns well, judged by its losses, with a command that does better.

Thresholds and advice stand here for all who judge: the watch over a running training, the report and `eval`. How high a loss is
says nothing by itself: free text ends at 1.1 to 1.6, short answers far below. What counts is how it moved, and whether the rows
that it was measured on can tell that from chance.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sftcli.config.schema.settings import Settings
from sftcli.figures import FEW_ROWS, are_few, loss_figure
from sftcli.services.runs.folder import RunFolder

Kind = Literal["good", "unchanged", "overfitting", "degrading", "forgetting", "plateau", "spike", "unknown"]

RISE = 0.02  # nats per token of held-out loss above its best that count as rising
FLAT = 0.005  # nats per token; a held-out loss that falls by less in several evaluations has come to rest
ERRORS = 2.0  # standard errors that a fall must be above to be told from chance
_SHARE = 0.5  # of the rows that may be held out at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """The command that trains a run once more, under a free name, with some flags changed."""

    run: RunFolder
    settings: Settings

    def command(self, flags: str) -> str:
        """Return the command, which runs as it is printed."""
        number = 2
        while (self.run.path.parent / f"{self.run.name}-{number}").exists():
            number += 1
        trust = " --trust-remote-code" if self.settings.model.trust_remote_code else ""
        name = shlex.quote(f"{self.run.name}-{number}")
        return f"sft train --config {shlex.quote(str(self.run.config))} --run {name}{trust} {flags}"

    def longer(self) -> str:
        """Return the flags for a run twice as long, at three times the rate."""
        training = self.settings.training
        steps = (
            f"--max-steps {2 * training.max_steps}"
            if training.max_steps
            else f"--epochs {2 * (training.epochs or 3.0):g}"
        )
        return f"{steps} --learning-rate {min(1.0, 3 * self._rate):.2g}"

    def slower(self) -> str:
        """Return the flag for a third of the rate."""
        return f"--learning-rate {self._rate / 3:.2g}"

    def more_heldout(self, rows: int) -> str:
        """Return the flag that holds out enough rows, where there are that many."""
        share = self.settings.data.heldout_fraction
        if not rows or not share or self.settings.data.heldout_sources:
            return "--set data.heldout_fraction=0.2"
        return f"--set data.heldout_fraction={min(_SHARE, math.ceil(100 * share * FEW_ROWS / rows) / 100):g}"

    def more_replay(self) -> str:
        """Return the flag that replays rows of earlier runs, or more of them."""
        return f"--replay {20 if not self.settings.data.replay else min(90, round(200 * self.settings.data.replay))}%"

    @property
    def _rate(self) -> float:
        return self.settings.training.learning_rate or 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``kind`` with the reason, and as advice what to do and the command for it."""

    kind: Kind
    reason: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A held-out loss after ``step`` steps, and the standard error of its fall since the first one, where that is known."""

    step: int
    loss: float
    fall_error: float | None = None


def judge_losses(
    train_losses: Sequence[float], heldout: Sequence[Measured], again: Again, *, rows: int = 0
) -> Verdict:
    """Judge a run by its training losses per step and its held-out losses, both in order of time.

    ``rows`` is how many the held-out losses are of, 0 where it is not known.
    """
    if len(heldout) < 2 or not train_losses:
        return Verdict(
            kind="unknown",
            reason="there are fewer than two held-out measurements",
            advice=f"hold rows out: {again.command(again.more_heldout(0))}",
        )
    if are_few(rows):
        return Verdict(
            kind="unknown",
            reason=f"{rows} held-out {'row is' if rows == 1 else 'rows are'} too few to say",
            advice=f"hold more out: {again.command(again.more_heldout(rows))}",
        )
    first, best, last = heldout[0], min(heldout, key=lambda one: one.loss), heldout[-1]
    train = mean_of_recent(train_losses)
    if best is first and last.loss > first.loss + RISE:
        return degrading(first.loss, last.loss, again)
    if last.loss > best.loss + RISE and train < last.loss:
        return overfitting(best, last.loss, train, again)
    fall, error = first.loss - last.loss, last.fall_error
    moved = f"from {loss_figure(first.loss)} to {loss_figure(last.loss)}"
    if error is not None and fall >= FLAT:
        moved += f", by {fall:.3f} with a standard error of {error:.3f}"
    if fall < max(FLAT, ERRORS * (error or 0.0)):
        what = "almost no change" if fall < FLAT else "no more than chance"
        return Verdict(
            kind="unchanged",
            reason=f"held-out loss went {moved}, which is {what}",
            advice=f"train longer, at a higher rate: {again.command(again.longer())}",
        )
    return Verdict(kind="good", reason=f"held-out loss fell {moved}", advice="")


def mean_of_recent(losses: Sequence[float]) -> float:
    """Return the mean of the newest tenth."""
    recent = losses[-max(1, len(losses) // 10) :]
    return sum(recent) / len(recent)


def overfitting(best: Measured, last: float, train: float, again: Again) -> Verdict:
    """Return the verdict on a held-out loss that rises while training loss falls."""
    return Verdict(
        kind="overfitting",
        reason=f"held-out loss rose from {loss_figure(best.loss)} to {loss_figure(last)} "
        f"while training loss is {train:.3f}",
        advice="stop earlier: " + again.command(f"--max-steps {best.step}"),
    )


def degrading(first: float, last: float, again: Again) -> Verdict:
    """Return the verdict on a held-out loss that was never as low as before training."""
    return Verdict(
        kind="degrading",
        reason=f"held-out loss was {loss_figure(first)} before training and is {loss_figure(last)} after it",
        advice=f"train at a lower rate: {again.command(again.slower())}",
    )


def plateau(evaluations: int, best: float, again: Again) -> Verdict:
    """Return the verdict on a held-out loss that leveled off before the end."""
    return Verdict(
        kind="plateau",
        reason=f"held-out loss fell by less than {FLAT:g} in the last {evaluations} evaluations; "
        f"the best is {loss_figure(best)}",
        advice="more steps may not help: Ctrl-C stops and saves; a run that stops by itself: "
        + again.command("--set training.early_stopping_evals=3"),
    )


def spike(what: str, value: float, usual: float, rows: str, again: Again) -> Verdict:
    """Return the verdict on a loss or gradient spike; ``rows`` names the rows of the step."""
    return Verdict(
        kind="spike",
        reason=f"{what} jumped to {value:.3g} from about {usual:.3g}; rows {rows}",
        advice=f"check these rows; if it happens again: {again.command(again.slower())}",
    )
