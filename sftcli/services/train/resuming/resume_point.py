"""Resuming a run: the choice of a checkpoint, and the check that nothing else has changed."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from sftcli import storage
from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.settings import FIELDS
from sftcli.errors import MismatchError, NotFoundError
from sftcli.events import EventSink, Notice, Warned
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.record import Resumption
from sftcli.services.train.resuming.changes import Changes
from sftcli.services.train.resuming.kept import checkpoint_of
from sftcli.training.checkpoint.format import newest_good, rng_tensors, verify
from sftcli.training.checkpoint.names import in_use, step_of
from sftcli.training.checkpoint.rewind import (
    TakenBack,
    close,
    has_newer,
    read_taken_back,
    rename_all,
    take_back,
)
from sftcli.training.checkpoint.store import clear_halves
from sftcli.training.distributed.group import Group
from sftcli.training.state import TrainingSnapshot


def choose_checkpoint(run: RunFolder, step: int | None, emit: EventSink) -> Path:
    """Return the checkpoint of ``step``, which may be set aside, or the newest one that verifies and is not.

    Raises:
        NotFoundError: There is none.
        DataError: The one asked for, or every one, is damaged.
    """
    if step is None:
        newest = newest_good(run.checkpoints, warn=lambda text: emit(Warned(text=text)))
        if newest is None:
            raise NotFoundError(
                f"run {run.name} has no checkpoint yet", hint=f"start it over: sft resume {run.argument}"
            )
        return newest
    checkpoint = checkpoint_of(run, step)
    verify(checkpoint)
    return checkpoint


def count_equal(
    replayed: TrainingSnapshot, stored: TrainingSnapshot, *, name: str, why_other: str, group: Group
) -> int:
    """Return how many tensors of weights, optimizer and random state were compared; ``why_other`` says why they may differ.

    Where ``replayed`` is a part of a snapshot, or nothing of it, the other processes of ``group`` compare the rest. All must call it.

    Raises:
        MismatchError: One of them differs in any bit.
    """
    rng = [
        {key: state for key, state in rng_tensors(snapshot).items() if not key.startswith("device")}
        for snapshot in (replayed, stored)
    ]
    pairs = ((replayed.weights, stored.weights), (replayed.optimizer, stored.optimizer), (rng[0], rng[1]))
    for ours, theirs in pairs:
        if key := _first_other(ours, theirs, group):
            raise MismatchError(f"the replay does not end at {name}: {key} differs", hint=why_other)
    return sum(len(theirs) for _, theirs in pairs)


def _first_other(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], group: Group) -> str:
    """Return the first name whose tensor no process has or one has otherwise; "" for none, in every process or in no one."""
    if group.any(bool(more := sorted(ours.keys() - theirs.keys()))):
        return next(iter(more), "what another process holds")
    names = sorted(theirs)
    same = [key in ours and torch.equal(ours[key].cpu(), theirs[key]) for key in names]
    found = group.sum([float(is_same) for is_same in same])
    wrong = group.sum([float(key in ours and not is_same) for key, is_same in zip(names, same, strict=True)])
    return next((key for key, right, bad in zip(names, found, wrong, strict=True) if bad or not right), "")


def clear_leftovers(run: RunFolder, emit: EventSink) -> None:
    """Remove what a killed process left half written, and end what it had begun. The caller holds the run's lock."""
    storage.sweep(run.path, is_locked=True)
    halves = clear_halves(run.checkpoints)
    if halves:
        emit(Notice(text=f"removed {', '.join(halves)}: incomplete, from a save that was killed"))
    plan = read_taken_back(run.checkpoints)
    if plan is None:
        return
    if has_newer(run.checkpoints, plan):
        close(run.checkpoints)
    else:
        _take_results_back(run, plan)


def _take_results_back(run: RunFolder, plan: TakenBack) -> None:
    rename_all(run.checkpoints, plan)
    for path, aside in run.results_set_aside.items():
        if path.exists():
            storage.remove_tree(aside)
            storage.disk.rename(path, aside)
    storage.disk.sync(run.path)
    if not plan.aside:
        close(run.checkpoints)


def _take_back(run: RunFolder, checkpoint: Path, emit: EventSink) -> Path:
    """Put what is later than ``checkpoint`` out of the way; return the path that it has from then on."""
    step = step_of(checkpoint)
    plan = take_back(run.checkpoints, step, was_finished=run.is_finished)
    if plan is not None:
        _take_results_back(run, plan)
        for name in plan.aside:
            emit(
                Notice(
                    text=f"checkpoint {name} is kept aside until a newer one is safe: the run resumes from step {step}"
                )
            )
    return in_use(checkpoint)


def rhythm_text(settings: CheckpointSettings, last_step: int) -> str:
    """Describe when checkpoints are saved, from which a killed run resumes."""
    steps, minutes = settings.every_steps, settings.every_minutes
    moments = [f"every {steps:,} steps"] if 0 < steps < last_step else []
    moments += [f"every {minutes:g} minutes"] if minutes else []
    return (
        f"a checkpoint is saved {', '.join([*moments, 'and at the end' if moments else 'at the end only'])}"
    )


def end_taking_back(run: RunFolder) -> None:
    """Delete what was set aside when a run was rewound: it has finished again."""
    close(run.checkpoints)
    for aside in run.results_set_aside.values():
        storage.try_remove_tree(aside)


def record_start_over(run: RunFolder, changes: Changes, emit: EventSink) -> None:
    """Record in ``run.json`` that the run starts over, and report it."""
    _record(run, 0, changes, emit)


def record_resume(run: RunFolder, checkpoint: Path, changes: Changes, emit: EventSink) -> Path:
    """Record in ``run.json`` where the run resumes and what changed, report it, and set later checkpoints aside.

    Return where ``checkpoint`` is then: it may have been set aside itself.
    """
    _record(run, step_of(checkpoint), changes, emit)
    return _take_back(run, checkpoint, emit)


def _record(run: RunFolder, step: int, changes: Changes, emit: EventSink) -> None:
    record = run.record()
    at = datetime.now(tz=UTC).isoformat(timespec="seconds")
    entry = Resumption(
        at=at, step=step, changes=changes.harmless, machine=changes.machine, allowed=changes.forced
    )
    now = {
        key: json.loads(value)
        for key, (_, value) in changes.forced.items()
        if key in FIELDS  # and no content, such as the rows
    }
    run.note(resumed=(*record.resumed, entry), changed={**record.changed, **now})
    for event in changes.message():
        emit(event)
