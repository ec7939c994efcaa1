"""Which checkpoints a run has, by their names alone: needs no torch, so a wrong step is told at once."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from sftcli.errors import NotFoundError
from sftcli.services.runs.folder import RunFolder
from sftcli.training.checkpoint.names import list_checkpoints, list_set_aside, step_of


def checkpoint_of(run: RunFolder, step: int) -> Path:
    """Return the checkpoint of ``step``, which may be set aside.

    Raises:
        NotFoundError: There is none.
    """
    found, aside = list_checkpoints(run.checkpoints), list_set_aside(run.checkpoints)
    for checkpoint in [*found, *aside]:
        if step_of(checkpoint) == step:
            return checkpoint
    hint = f"it has: {_steps(found)}" + (f"; set aside: {_steps(aside)}" if aside else "")
    raise NotFoundError(f"run {run.name} has no checkpoint of step {step}", hint=hint)


def pair_to_verify(run: RunFolder, step: int | None) -> tuple[Path, Path]:
    """Return the checkpoint of ``step``, or the newest but one, and the one that follows it.

    Raises:
        NotFoundError: There are no two such checkpoints.
    """
    found = list_checkpoints(run.checkpoints)
    for first, second in reversed(list(pairwise(found))):
        if step in (None, step_of(first)):
            return first, second
    if step is not None:
        checkpoint_of(run, step)
        raise NotFoundError(
            f"run {run.name} has no checkpoint behind step {step} to replay to",
            hint=f"it has: {_steps(found)}",
        )
    have = {0: "no checkpoint", 1: f"one checkpoint, of step {_steps(found)},"}[len(found)]
    raise NotFoundError(
        f"run {run.name} has {have} and a replay goes from one to the next",
        hint="a new run saves more with --save-every STEPS, and keeps checkpoint.keep_last of them",
    )


def _steps(checkpoints: Sequence[Path]) -> str:
    return ", ".join(str(step_of(checkpoint)) for checkpoint in checkpoints) or "none"
