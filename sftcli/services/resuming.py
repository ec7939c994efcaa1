"""What it takes to go on with a run: which checkpoint, and whether everything is still what it was."""

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from sftcli import storage
from sftcli.errors import MismatchError, NotFoundError
from sftcli.events import EventSink, Notice, Warned
from sftcli.services.comparing import Changes
from sftcli.services.run_folder import RunFolder, write_json
from sftcli.training.checkpoint_files import newest_good, rng_tensors, verify
from sftcli.training.checkpoint_names import list_checkpoints, step_of
from sftcli.training.state import Snapshot


def choose_checkpoint(run: RunFolder, step: int | None, emit: EventSink) -> Path:
    """Return the checkpoint of ``step``, or the newest one that verifies.

    Raises:
        NotFoundError: There is none.
        DataError: The one asked for, or every one, is damaged.
    """
    if step is None:
        newest = newest_good(run.checkpoints, warn=lambda text: emit(Warned(text=text)))
        if newest is None:
            raise NotFoundError(f"run {run.name} has no checkpoint yet", hint="start it again: sft train")
        return newest
    found = list_checkpoints(run.checkpoints)
    for checkpoint in found:
        if step_of(checkpoint) == step:
            verify(checkpoint)
            return checkpoint
    steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found) or "none"
    raise NotFoundError(f"run {run.name} has no checkpoint of step {step}", hint=f"it has: {steps}")


def pair_to_verify(run: RunFolder, step: int | None) -> tuple[Path, Path]:
    """Return the checkpoint of ``step``, or the newest but one, and the one that follows it.

    Raises:
        NotFoundError: There are no two such checkpoints.
    """
    found = list_checkpoints(run.checkpoints)
    for first, second in reversed(list(pairwise(found))):
        if step in (None, step_of(first)):
            return first, second
    steps = ", ".join(str(step_of(checkpoint)) for checkpoint in found) or "none"
    raise NotFoundError(
        f"run {run.name} has no two checkpoints to replay between",
        hint=f"it has: {steps}; see checkpoint.keep_last",
    )


def count_equal(replayed: Snapshot, stored: Snapshot, *, name: str) -> int:
    """Return how many tensors of weights, optimizer and random state were compared.

    Raises:
        MismatchError: One of them differs in any bit.
    """
    count = 0
    rng = [
        {key: state for key, state in rng_tensors(snapshot).items() if not key.startswith("device")}
        for snapshot in (replayed, stored)
    ]
    pairs = ((replayed.weights, stored.weights), (replayed.optimizer, stored.optimizer), (rng[0], rng[1]))
    for ours, theirs in pairs:
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in ours or key not in theirs or not torch.equal(ours[key].cpu(), theirs[key]):
                raise MismatchError(
                    f"the replay does not end at {name}: {key} differs",
                    hint="the machine, its threads or the library versions are not those of the run",
                )
            count += 1
    return count


def clear_leftovers(run: RunFolder, emit: EventSink) -> None:
    """Remove what a killed process left half written. The caller holds the run's lock."""
    removed = storage.sweep(run.path, older_than_seconds=0)
    removed += storage.sweep(run.checkpoints, older_than_seconds=0)
    unfinished = [name for name in removed if name.startswith(f"{storage.TEMPORARY}step-")]
    if unfinished:
        emit(Notice(text=f"removed {', '.join(unfinished)}: left half written when a save was killed"))


def _set_aside_later(run: RunFolder, checkpoint: Path, emit: EventSink) -> None:
    """Take checkpoints after ``checkpoint`` out of the way; they are deleted once the first new one is safe."""
    for later in list_checkpoints(run.checkpoints):
        if step_of(later) > step_of(checkpoint):
            storage.disk.rename(later, later.with_name(f"{storage.TRASH}{later.name}"))
            emit(
                Notice(
                    text=f"checkpoint {later.name} is set aside: the run goes on from step {step_of(checkpoint)}"
                )
            )


def record_resume(run: RunFolder, checkpoint: Path, changes: Changes, emit: EventSink) -> None:
    """Write into ``run.json`` from where the run goes on and what changed, tell it, and put later checkpoints aside."""
    about = run.read_about()
    before = about.get("resumed")
    entry = {
        "at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "step": step_of(checkpoint),
        "changes": {key: list(pair) for key, pair in changes.harmless.items()},
        "machine": {key: list(pair) for key, pair in changes.machine.items()},
        "allowed": {key: list(pair) for key, pair in changes.forced.items()},
    }
    write_json(run.about, about | {"resumed": [*(before if isinstance(before, list) else []), entry]})
    for event in changes.told():
        emit(event)
    _set_aside_later(run, checkpoint, emit)
