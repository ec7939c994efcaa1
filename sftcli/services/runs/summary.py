"""What became of the runs in a folder, read from the files they left: no model and no torch are needed."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from sftcli.errors import DataError, StorageError
from sftcli.events import (
    DataPrepared,
    EarlierDone,
    Event,
    ExpertLoad,
    FitStarted,
    HeldoutDone,
    Judged,
    MemoryEased,
    ModelLoaded,
    StepDone,
    Warned,
)
from sftcli.services.runs.earlier import Kept, kept_of
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, list_runs
from sftcli.services.runs.lock import LOCK, is_held
from sftcli.services.runs.record import RunRecord
from sftcli.training.checkpoint.names import list_checkpoints, list_set_aside, step_of

MAX_CURVE = 64  # points of the loss that a summary keeps

_Kind = TypeVar("_Kind", bound=Event)


class RunState(StrEnum):
    """The state of a run."""

    FINISHED = "finished"
    RUNNING = "running"  # a process that lives trains it
    STOPPED = "stopped"  # it can go on from a checkpoint
    BROKEN_OFF = "broken-off"  # it ended before its first checkpoint, and can start over
    SCORED = "scored"  # of a comparison, which has removed its weights
    DAMAGED = "damaged"  # what it says about itself cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run at a glance. Losses are nats per response token; None where nothing was measured yet."""

    name: str
    path: str
    state: RunState
    started_at: str  # ISO 8601, UTC
    command: str
    model: str
    data: str
    step: int
    last_step: int  # 0 while it is not known
    loss: float | None  # of the last step on rows; that of pretraining text is another quantity
    first_heldout_loss: float | None
    heldout_loss: float | None
    heldout_step: int  # of that loss
    best_heldout_loss: float | None  # at the best step, which the score of answers may decide
    best_step: int
    heldout_rows: int  # that these losses are of; 0 where the log does not tell
    measure: str  # what says which held-out answers are right; empty where none were given
    answered: int  # of them at each evaluation
    first_score: float | None  # mean of their scores, 0 to 1
    score: float | None
    best_score: float | None  # at the step of the best loss
    earlier: tuple[Kept, ...]  # what became of the rows that the runs it trained on from held out
    router_aux_loss: float | None  # of the last step; None where none is trained
    first_experts: ExpertLoad | None  # the least even layer of each measure, at the first held-out loss
    experts: ExpertLoad | None  # the same at the last one; None without routed experts
    tokens_per_second: float | None  # of the steps alone, padding excluded
    utilization: float | None  # share of the measured peak of matrix products, of the steps alone
    training_seconds: float
    checkpoints: tuple[int, ...]  # steps
    set_aside: tuple[int, ...]  # those that the run was taken back from and that are still there
    warnings: tuple[str, ...]
    curve: tuple[float, ...]  # training loss, thinned


class RunHistory:
    """The events of a run, for those who look back on it."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = tuple(events)
        self.steps = self.of(StepDone)
        # The loss of pretraining text is another quantity.
        self.row_steps = [step for step in self.steps if not step.text_tokens]
        self.losses = [step.loss for step in self.row_steps if math.isfinite(step.loss)]
        self.heldout = [event for event in self.of(HeldoutDone) if math.isfinite(event.loss)]

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """Return the events of one class."""
        return [event for event in self.events if isinstance(event, kind)]

    def last(self, kind: type[_Kind]) -> _Kind | None:
        """Return the newest event of one class."""
        return next((event for event in reversed(self.events) if isinstance(event, kind)), None)

    @property
    def heldout_rows(self) -> int:
        """Number of rows of the newest held-out loss; 0 if the log does not have it."""
        newest = self.last(HeldoutDone)
        return newest.rows if newest else 0

    @property
    def router_aux_loss(self) -> float | None:
        """That of the last step; None where none is trained."""
        found = self.steps[-1].router_aux_loss if self.steps else None
        return found if found is not None and math.isfinite(found) else None

    @property
    def seconds(self) -> float:
        """What the steps took together."""
        return sum(step.seconds for step in self.steps if math.isfinite(step.seconds))

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps, padding excluded."""
        return sum(step.tokens for step in self.steps) / self.seconds if self.seconds else None

    @property
    def utilization(self) -> float | None:
        """Share of the measured peak that all steps used; None if not measured."""
        gauged = [
            (step.utilization, step.seconds)
            for step in self.steps
            if step.utilization is not None and math.isfinite(step.seconds)
        ]
        total = sum(seconds for _, seconds in gauged)
        return sum(share * seconds for share, seconds in gauged) / total if total else None


def summarize_runs(root: Path) -> list[RunSummary]:
    """Return the runs under ``root``, newest first, and damaged ones last."""
    return [_summarize(run, is_one_of_many=True) for run in list_runs(root)]


def summarize_run(run: RunFolder) -> RunSummary:
    """Return a summary of the files of a run.

    Raises:
        DataError: It is damaged.
    """
    return _summarize(run, is_one_of_many=False)


def _summarize(run: RunFolder, *, is_one_of_many: bool) -> RunSummary:
    record = RunRecord()
    faults: list[str] = []
    history = RunHistory(())
    try:
        record = run.record()
    except DataError as error:
        if not is_one_of_many:
            raise
        faults.append(error.message)
    try:
        history = RunHistory(read_events(run))
    except StorageError as error:
        if not is_one_of_many:
            raise
        faults.append(error.message)
    checkpoints = tuple(map(step_of, list_checkpoints(run.checkpoints)))
    row_steps, heldout = history.row_steps, history.heldout
    best = min(heldout, key=lambda event: event.rank, default=None)
    given = heldout[-1].given if heldout else None
    model, data, fit = history.last(ModelLoaded), history.last(DataPrepared), history.last(FitStarted)
    return RunSummary(
        name=run.name,
        path=str(run.path),
        state=RunState.DAMAGED if faults else _state(run, checkpoints),
        started_at=record.started_at,
        command=record.command,
        model=model.name if model else "",
        data=data.source if data else "",
        step=history.steps[-1].step if history.steps else 0,
        last_step=fit.last_step if fit else 0,
        loss=row_steps[-1].loss if row_steps and math.isfinite(row_steps[-1].loss) else None,
        first_heldout_loss=heldout[0].loss if heldout else None,
        heldout_loss=heldout[-1].loss if heldout else None,
        heldout_step=heldout[-1].step if heldout else 0,
        best_heldout_loss=best.loss if best else None,
        best_step=best.step if best else 0,
        heldout_rows=history.heldout_rows,
        measure=given.measure if given else "",
        answered=given.rows if given else 0,
        first_score=_score(heldout[0]) if heldout else None,
        score=given.score if given else None,
        best_score=_score(best) if best else None,
        earlier=tuple(kept_of(history.of(EarlierDone))),
        router_aux_loss=history.router_aux_loss,
        first_experts=ExpertLoad.worst(heldout[0].experts) if heldout else None,
        experts=ExpertLoad.worst(heldout[-1].experts) if heldout else None,
        tokens_per_second=history.tokens_per_second,
        utilization=history.utilization,
        training_seconds=history.seconds,
        checkpoints=checkpoints,
        set_aside=tuple(map(step_of, list_set_aside(run.checkpoints))),
        warnings=(*filter(None, map(_warning, history.events)), *faults),
        curve=tuple(_thinned(history.losses)),
    )


def not_since(first: str, last: str, step: int) -> str:
    """Describe a held-out loss last measured at ``step``, before the current step."""
    return (
        f"{first} at step 0, not measured since"
        if not step
        else f"{first} before, {last} at step {step}, not measured since"
    )


def can_be_scored(run: RunFolder) -> bool:
    """Return whether ``sft eval`` finds held-out rows with answers in ``run``; true where its files do not tell."""
    rows = run.rows()
    if rows is None:
        return True
    heldout = rows.audit.get("heldout")
    return heldout is not None and bool(heldout.kept) and bool(heldout.prompt_tokens)  # text has no prompts


def _state(run: RunFolder, checkpoints: tuple[int, ...]) -> RunState:
    if is_held(run.path / LOCK):
        return RunState.RUNNING
    if run.is_finished:
        return RunState.FINISHED
    if run.has_lost_weights:
        return RunState.SCORED
    return RunState.STOPPED if checkpoints else RunState.BROKEN_OFF


def _warning(event: Event) -> str:
    if isinstance(event, Judged):
        return f"{event.kind} at step {event.step}: {event.reason}"
    return event.text if isinstance(event, Warned | MemoryEased) else ""


def _score(event: HeldoutDone) -> float | None:
    return None if event.given is None else event.given.score


def _thinned(values: list[float]) -> Iterator[float]:
    """Yield the means of at most ``MAX_CURVE`` neighboring groups of ``values``."""
    groups = min(MAX_CURVE, len(values))
    for index in range(groups):
        group = values[index * len(values) // groups : (index + 1) * len(values) // groups]
        yield sum(group) / len(group)
