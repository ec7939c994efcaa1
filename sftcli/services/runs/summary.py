"""What became of the runs in a folder, read from the files they left: no model and no torch are needed."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sftcli.errors import DataError
from sftcli.services.runs.folder import RunFolder, list_runs
from sftcli.services.runs.lock import LOCK, is_held
from sftcli.training.checkpoint.names import list_checkpoints, list_set_aside, step_of

MAX_CURVE = 64  # points of the loss that a summary keeps


class RunState(StrEnum):
    """Where a run stands."""

    FINISHED = "finished"
    RUNNING = "running"  # a process that lives trains it
    STOPPED = "stopped"  # it can go on from a checkpoint
    BROKEN_OFF = "broken-off"  # it ended before its first checkpoint, and can start over
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
    loss: float | None  # of the last step on rows; that of running text is another quantity
    first_heldout_loss: float | None
    heldout_loss: float | None
    heldout_step: int  # of that loss
    best_heldout_loss: float | None
    best_step: int
    heldout_rows: int  # that these losses are of; 0 where the log does not tell
    tokens_per_second: float | None  # of the steps alone, padding excluded
    utilisation: float | None  # share of the measured peak of matrix products, of the steps alone
    training_seconds: float
    checkpoints: tuple[int, ...]  # steps
    set_aside: tuple[int, ...]  # those that the run was taken back from and that are still there
    warnings: tuple[str, ...]
    curve: tuple[float, ...]  # training loss, thinned


def summarize_runs(root: Path) -> list[RunSummary]:
    """Return the runs under ``root``, newest first, and damaged ones last."""
    return [_summarize(run, is_one_of_many=True) for run in list_runs(root)]


def summarize_run(run: RunFolder) -> RunSummary:
    """Return what the files of a run say about it.

    Raises:
        DataError: It is damaged.
    """
    return _summarize(run, is_one_of_many=False)


def _summarize(run: RunFolder, *, is_one_of_many: bool) -> RunSummary:
    about: Mapping[str, object] = {}
    faults: list[str] = []
    try:
        about = run.read_about()
    except DataError as error:
        if not is_one_of_many:
            raise
        faults.append(error.message)
    checkpoints = tuple(map(step_of, list_checkpoints(run.checkpoints)))
    events = list(run.iterate_events())
    steps = [event for event in events if event.get("event") == "StepDone"]
    heldout = [
        (value, event.get("step"))
        for event in events
        if event.get("event") == "HeldoutDone" and (value := _number(event, "loss")) is not None
    ]
    best = min(heldout, key=lambda pair: pair[0], default=None)
    of_rows = [event for event in steps if not event.get("text_tokens")]
    losses = [value for event in of_rows if (value := _number(event, "loss")) is not None]
    seconds = sum(_number(event, "seconds") or 0.0 for event in steps)
    tokens = sum(_number(event, "tokens") or 0.0 for event in steps)
    return RunSummary(
        name=run.name,
        path=str(run.path),
        state=RunState.DAMAGED if faults else _state(run, checkpoints),
        started_at=str(about.get("started_at", "")),
        command=str(about.get("command", "")),
        model=_last(events, "ModelLoaded", "name"),
        data=_last(events, "DataPrepared", "source"),
        step=max([int(_number(event, "step") or 0) for event in steps[-1:]], default=0),
        last_step=int(_last(events, "FitStarted", "last_step") or 0),
        loss=_number(of_rows[-1], "loss") if of_rows else None,
        first_heldout_loss=heldout[0][0] if heldout else None,
        heldout_loss=heldout[-1][0] if heldout else None,
        heldout_step=int(str(heldout[-1][1])) if heldout else 0,
        best_heldout_loss=best[0] if best else None,
        best_step=int(str(best[1])) if best else 0,
        heldout_rows=heldout_rows(events),
        tokens_per_second=tokens / seconds if seconds else None,
        utilisation=mean_utilisation(steps),
        training_seconds=seconds,
        checkpoints=checkpoints,
        set_aside=tuple(map(step_of, list_set_aside(run.checkpoints))),
        warnings=(*filter(None, map(_warning, events)), *faults),
        curve=tuple(_thinned(losses)),
    )


def heldout_rows(events: Iterable[Mapping[str, object]]) -> int:
    """Return how many rows the newest held-out loss of a run's ``events`` is of; 0 where they do not tell."""
    rows = [event.get("rows", 0) for event in events if event.get("event") == "HeldoutDone"]
    return rows[-1] if rows and isinstance(rows[-1], int) else 0


def not_since(first: str, last: str, step: int) -> str:
    """Return in words what is known of a held-out loss that was last measured at ``step``, and is behind."""
    return (
        f"{first} at step 0, not measured since"
        if not step
        else f"{first} before, {last} at step {step}, not measured since"
    )


def mean_utilisation(steps: Sequence[Mapping[str, object]]) -> float | None:
    """Return what part of the measured peak logged steps made use of over all; None where none was measured."""
    pairs = [(_number(step, "utilisation"), _number(step, "seconds") or 0.0) for step in steps]
    gauged = [(share, seconds) for share, seconds in pairs if share is not None]
    total = sum(seconds for _, seconds in gauged)
    return sum(share * seconds for share, seconds in gauged) / total if total else None


def _state(run: RunFolder, checkpoints: tuple[int, ...]) -> RunState:
    if is_held(run.path / LOCK):
        return RunState.RUNNING
    if run.is_finished:
        return RunState.FINISHED
    return RunState.STOPPED if checkpoints else RunState.BROKEN_OFF


def _last(events: list[dict[str, object]], kind: str, key: str) -> str:
    found = [event for event in events if event.get("event") == kind]
    return str(found[-1].get(key, "")) if found else ""


def _warning(event: dict[str, object]) -> str:
    if event.get("event") == "Judged":
        return f"{event.get('kind')} at step {event.get('step')}: {event.get('reason')}"
    return str(event.get("text", "")) if event.get("event") in {"Warned", "MemoryEased"} else ""


def _number(event: Mapping[str, object], key: str) -> float | None:
    value = event.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _thinned(values: list[float]) -> Iterator[float]:
    """Yield the means of at most ``MAX_CURVE`` neighbouring groups of ``values``."""
    groups = min(MAX_CURVE, len(values))
    for index in range(groups):
        group = values[index * len(values) // groups : (index + 1) * len(values) // groups]
        yield sum(group) / len(group)


def read_scores(run: RunFolder) -> dict[str, object] | None:
    """Return what ``sft eval`` has written about a run; None where it has not, or not whole."""
    try:
        scores = json.loads(run.evaluation.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(scores) if isinstance(scores, dict) else None
