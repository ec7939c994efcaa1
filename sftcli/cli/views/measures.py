"""What a training run looks like so far, computed from its events. Knows nothing about terminals."""

from collections import deque
from dataclasses import dataclass, field
from math import isfinite, nan

from sftcli.events import CheckpointSaved, FitStarted, HeldoutDone, StepDone

WINDOW_STEPS = 20
_SMOOTHING = 0.9
_MAX_POINTS = 512


@dataclass(slots=True)
class Trace:
    """A curve in bounded memory: when it is full, neighbors are merged into their mean."""

    points: list[float] = field(default_factory=list)
    stride: int = 1  # values behind one point
    _sum: float = 0.0
    _count: int = 0

    def append(self, value: float) -> None:
        """Add a value; one that is not finite is left out."""
        if not isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self.stride:
            return
        self.points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.points) == _MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(first + second) / 2 for first, second in pairs]
            self.stride *= 2


@dataclass(slots=True)
class TrainingMeasures:
    """The numbers of a run that views show. Times are of this process, not of earlier ones that were resumed."""

    start_step: int = 0
    step: int = 0
    last_step: int = 0
    last: StepDone | None = None
    skipped_steps: int = 0
    losses: Trace = field(default_factory=Trace)
    first_heldout: HeldoutDone | None = None
    best_heldout: HeldoutDone | None = None
    last_heldout: HeldoutDone | None = None
    checkpoint: CheckpointSaved | None = None
    _recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    _smooth_sum: float = 0.0
    _smooth_weight: float = 0.0
    _first_seconds: float = 0.0
    _checkpoint_seconds: float = 0.0
    _heldout_seconds: float = 0.0  # of the evaluations since training started
    _heldout_step: int = 0  # of the newest of them
    _started: bool = False
    _gauged_seconds: float = 0.0  # of steps whose utilization is known
    _peak_seconds: float = 0.0  # that they would have taken at the peak

    def start(self, event: FitStarted) -> None:
        """Begin to count at ``event.step``."""
        self.start_step = self.step = self._heldout_step = event.step
        self.last_step = event.last_step
        self._started = True

    def add_step(self, event: StepDone) -> None:
        """Take a step into account."""
        self.step, self.last = event.step, event
        if self._first_seconds:
            self._recent.append(event)
        else:
            self._first_seconds = max(event.seconds, 1e-9)
        if event.utilization is not None:
            self._gauged_seconds += event.seconds
            self._peak_seconds += event.seconds * event.utilization
        if not event.applied:
            self.skipped_steps += 1
        if isfinite(event.loss) and not event.text_tokens:  # the loss of pretraining text is another quantity
            self.losses.append(event.loss)
            self._smooth_sum = _SMOOTHING * self._smooth_sum + (1 - _SMOOTHING) * event.loss
            self._smooth_weight = _SMOOTHING * self._smooth_weight + (1 - _SMOOTHING)

    def add_heldout(self, event: HeldoutDone) -> None:
        """Take an evaluation into account."""
        self.last_heldout = event
        if self.first_heldout is None:
            self.first_heldout = event
        best = self.best_heldout
        if isfinite(event.loss) and (best is None or event.rank < best.rank):
            self.best_heldout = event
        if self._started and event.step > self._heldout_step:
            self._heldout_seconds += event.seconds
            self._heldout_step = event.step

    def add_checkpoint(self, event: CheckpointSaved) -> None:
        """Take a saved checkpoint into account."""
        self.checkpoint = event
        self._checkpoint_seconds += event.seconds

    @property
    def smooth_loss(self) -> float:
        """Mean of the losses in which each older step weighs a tenth less; NaN before the first."""
        return self._smooth_sum / self._smooth_weight if self._smooth_weight else nan

    @property
    def fraction(self) -> float:
        """Share of the steps that are done."""
        return min(1.0, self.step / self.last_step) if self.last_step else 0.0

    @property
    def last_epoch(self) -> float:
        """Passes over the training examples at the last step, at the rate of the steps so far; 0 before the first."""
        return self.last.epoch * self.last_step / self.step if self.last and self.step else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds of a recent step; the first one, which warms up, counts only while it is the only one."""
        if self._recent:
            return sum(event.seconds for event in self._recent) / len(self._recent)
        return self._first_seconds

    @property
    def response_tokens_per_second(self) -> float:
        """Recent speed in tokens that have loss."""
        return self._speed(sum(event.response_tokens for event in self._window()))

    @property
    def tokens_per_second(self) -> float:
        """Recent speed in tokens fed to the model, padding excluded."""
        return self._speed(sum(event.tokens for event in self._window()))

    @property
    def utilization(self) -> float | None:
        """Share of the measured peak of matrix products that recent steps made use of; ``None`` where it was not measured."""
        measured = [(event.utilization, event.seconds) for event in self._window()]
        seconds = sum(part for share, part in measured if share is not None)
        return (
            sum(share * part for share, part in measured if share is not None) / seconds if seconds else None
        )

    @property
    def whole_utilization(self) -> float | None:
        """The same over all steps of this process."""
        return self._peak_seconds / self._gauged_seconds if self._gauged_seconds else None

    @property
    def padding_fraction(self) -> float:
        """Share of the positions in recent batches that hold padding."""
        padding = sum(event.padding_tokens for event in self._window())
        positions = padding + sum(event.tokens for event in self._window())
        return padding / positions if positions else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Time to the end, evaluations and checkpoints included as far as they were measured; ``None`` before a step."""
        if self.last is None or not self._first_seconds:
            return None
        left = max(0, self.last_step - self.step)
        taken = max(1, self.step - self.start_step)
        return (
            left * (self.step_seconds + self._checkpoint_seconds / taken) + self._remaining_heldout_seconds()
        )

    def _remaining_heldout_seconds(self) -> float:
        measured = self._heldout_step - self.start_step
        if measured > 0:
            return self._heldout_seconds * max(0, self.last_step - self._heldout_step) / measured
        return self.first_heldout.seconds if self.first_heldout else 0.0

    def _window(self) -> list[StepDone]:
        return list(self._recent) or ([self.last] if self.last else [])

    def _speed(self, tokens: int) -> float:
        seconds = sum(event.seconds for event in self._window())
        return tokens / seconds if seconds > 0 else 0.0
