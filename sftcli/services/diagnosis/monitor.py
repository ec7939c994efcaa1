"""Warns about the losses of a running training: each kind once per run, spikes again after a while.

What it knows follows from the run's events alone, so a resumed run says what an uninterrupted one says.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sftcli.events import EarlierDone, Event, EventSink, FitStarted, HeldoutDone, Judged, StepDone
from sftcli.figures import are_few
from sftcli.services.diagnosis.forgetting import judged_with
from sftcli.services.diagnosis.verdict import (
    FLAT,
    RISE,
    Again,
    Measured,
    Verdict,
    degrading,
    judge_losses,
    mean_of_recent,
    overfitting,
    plateau,
    spike,
)
from sftcli.services.runs.earlier import Kept, kept_of

WINDOW_STEPS = 64  # what a spike is compared with
MIN_STEPS = 32
DEVIATIONS = 7.0  # robust standard deviations of the logarithm above the median
LEAST_RATIO = {"loss": 1.5, "gradient norm": 4.0}  # to the median; less is no news even in a very steady run
QUIET_STEPS = 50  # after a spike
PLATEAU_EVALS = 3
SPOILT_STEPS = 5  # in a row with a loss far above the usual, which is no single bad batch any more


@dataclass(slots=True)
class SpikeDetector:
    """Detects values far above the preceding ones. Works on logarithms, in which losses and norms scatter evenly."""

    least_ratio: float
    _past: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))

    def usual(self, value: float) -> float | None:
        """Return the usual value if ``value`` is a spike, else None; record it."""
        if not math.isfinite(value) or value <= 0:
            return None
        log, past = math.log(value), list(self._past)
        self._past.append(log)
        if len(past) < MIN_STEPS:
            return None
        median = statistics.median(past)
        deviation = 1.4826 * statistics.median(
            abs(x - median) for x in past
        )  # sigma of a normal distribution
        is_spike = log > median + max(DEVIATIONS * deviation, math.log(self.least_ratio))
        return math.exp(median) if is_spike else None


@dataclass(slots=True)
class FitWatch:
    """What the events so far say about the fit.

    Args:
        again: Makes the commands of its advice.
        name_rows: Returns the rows of a step in words.
        stops_early: Whether the run ends by itself on a plateau.
    """

    again: Again
    high_steps: int = field(default=0, init=False)  # in a row, up to now, with a loss far above the usual

    name_rows: Callable[[int], str] = lambda step: f"of step {step}"
    stops_early: bool = False
    last_step: int = 0
    rows: int = 0  # that a held-out loss is of; 0 while it is not known
    losses: list[float] = field(default_factory=list)  # training, finite ones
    heldout: list[Measured] = field(default_factory=list)
    earlier: list[EarlierDone] = field(default_factory=list)
    _at_heldout: list[int] = field(default_factory=list)  # how many training losses there were by then
    _said: dict[str, int] = field(default_factory=dict)  # kind -> step
    _detectors: dict[str, SpikeDetector] = field(
        default_factory=lambda: {what: SpikeDetector(ratio) for what, ratio in LEAST_RATIO.items()}
    )

    def replay(self, events: Iterable[Event]) -> None:
        """Replay the log of the run without repeating its warnings."""
        for event in events:
            if isinstance(event, FitStarted):
                self.last_step = event.last_step
            elif isinstance(event, StepDone) and not event.text_tokens:
                self._learn(event.loss, event.grad_norm)
            elif isinstance(event, HeldoutDone):
                self._add_heldout(event)
            elif isinstance(event, EarlierDone):
                self.earlier.append(event)
            elif isinstance(event, Judged):
                self._said[event.kind] = event.step
        if self.is_non_finite:  # the run stopped for it, and someone goes on all the same
            self.high_steps = 0

    def take(self, event: Event) -> list[Verdict]:
        """Return the warnings that ``event`` causes."""
        if isinstance(event, FitStarted):
            self.last_step = event.last_step
        elif isinstance(event, StepDone):
            return [] if event.text_tokens else self._on_step(event)  # the loss of text is another quantity
        elif isinstance(event, HeldoutDone):
            return self._once(event.step, self._on_heldout(event))
        elif isinstance(event, EarlierDone):
            self.earlier.append(event)
        return []

    @property
    def is_non_finite(self) -> bool:
        """Whether the loss spiked and stayed high."""
        return self.high_steps >= SPOILT_STEPS

    @property
    def kept(self) -> list[Kept]:
        """What became of the rows that earlier runs held out."""
        return kept_of(self.earlier)

    def verdict(self, step: int) -> Verdict:
        """Return the verdict on the run up to ``step``."""
        measured = [one for one in self.heldout if one.step <= step]
        own = judge_losses(self.losses, measured, self.again, rows=self.rows)
        return judged_with(self.kept, own, self.again)

    def _on_step(self, event: StepDone) -> list[Verdict]:
        said: list[Verdict] = []
        quiet = self._said.get("spike", -QUIET_STEPS)
        for what, usual in self._learn(event.loss, event.grad_norm).items():
            if event.step - quiet >= QUIET_STEPS and not said:
                value = event.loss if what == "loss" else event.grad_norm
                said.append(spike(what, value, usual, self.name_rows(event.step), self.again))
                self._said["spike"] = event.step
        return said

    def _learn(self, loss: float, grad_norm: float) -> dict[str, float]:
        """Remember a step; return by name what is out of line and what would have been usual."""
        if math.isfinite(loss):
            self.losses.append(loss)
        found = {"loss": self._detectors["loss"].usual(loss)}
        self.high_steps = 0 if found["loss"] is None else self.high_steps + 1
        found["gradient norm"] = self._detectors["gradient norm"].usual(grad_norm)
        return {what: usual for what, usual in found.items() if usual is not None}

    def _add_heldout(self, event: HeldoutDone) -> None:
        self.rows = event.rows
        if math.isfinite(event.loss):
            self.heldout.append(Measured(step=event.step, loss=event.loss, fall_error=event.fall_error))
            self._at_heldout.append(len(self.losses))

    def _on_heldout(self, event: HeldoutDone) -> Verdict | None:
        self._add_heldout(event)
        if len(self.heldout) < 2 or not self.losses or not math.isfinite(event.loss) or are_few(self.rows):
            return None
        losses = [one.loss for one in self.heldout]
        first, best, last = losses[0], min(losses), losses[-1]
        rises = last > best + RISE and (losses[-2] > best + RISE or event.step == self.last_step)
        if rises and best == first and self.heldout[0].step == 0:
            return degrading(first, last, self.again)
        if rises and self._still_learns(losses.index(best)):
            lowest = self.heldout[losses.index(best)]
            return overfitting(lowest, last, mean_of_recent(self.losses), self.again)
        return None if rises or self.stops_early else self._plateau(event.step, losses)

    def _still_learns(self, best_index: int) -> bool:
        """Return whether training loss is lower now than it was around the best evaluation."""
        then = self.losses[: self._at_heldout[best_index]]
        return not then or mean_of_recent(self.losses) < sum(then[-10:]) / len(then[-10:])

    def _plateau(self, step: int, losses: list[float]) -> Verdict | None:
        before, recent = losses[:-PLATEAU_EVALS], losses[-PLATEAU_EVALS:]
        if not before or step > 0.9 * self.last_step or min(before) - min(recent) >= FLAT:
            return None
        return plateau(PLATEAU_EVALS, min(losses), self.again)

    def _once(self, step: int, verdict: Verdict | None) -> list[Verdict]:
        if verdict is None or verdict.kind in self._said:
            return []
        self._said[verdict.kind] = step
        return [verdict]


def watched(watch: FitWatch, emit: EventSink) -> EventSink:
    """Return a sink that forwards events to ``emit``, each followed by its warnings."""

    def sink(event: Event, /) -> None:
        emit(event)
        step = event.step if isinstance(event, StepDone | HeldoutDone) else 0
        for verdict in watch.take(event):
            emit(Judged(step=step, kind=verdict.kind, reason=verdict.reason, advice=verdict.advice))

    return sink
