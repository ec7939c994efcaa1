"""A run that is given another end: whether that is asked of a finished one, and what it does to the learning rate."""

import json
from collections.abc import Sequence

from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import UsageError
from sftcli.services.runs.folder import LENGTH, Recorded, RunFolder
from sftcli.services.train.resuming.changes import Changes, compare_start, named_settings
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.optim.schedule import learning_rate_at

_STEPS = LENGTH[0]


def asks_longer(recorded: Recorded, allowed: Sequence[str]) -> bool:
    """Return whether a finished run is given an end that it is not at; otherwise nothing of it may differ.

    Raises:
        MismatchError: Something differs that is not allowed.
    """
    has, asked = (
        {name: value for name, value in named_settings(settings).items() if name.endswith(LENGTH)}
        for settings in (recorded.has, recorded.settings)
    )
    compare_start(
        recorded.has, recorded.settings, allowed=allowed if has != asked else (), finished=recorded.run
    )
    newest = [step_of(path) for path in list_checkpoints(recorded.run.checkpoints)][-1:]
    return has != asked and newest != [recorded.settings.training.max_steps]


def require_steps_left(
    run: RunFolder, step: int, changes: Changes, settings: TrainingSettings, *, stale_evals: int
) -> None:
    """Make sure that a run at ``step`` with another end has a step to take before it.

    Raises:
        UsageError: It has none, or early stopping would end it at once.
    """
    if not changes.forced.keys() & set(LENGTH):
        return
    end, command = settings.max_steps, f"sft resume {run.argument}"
    if step > end or (step == end and run.is_finished):
        raise UsageError(
            f"{run.name} is at step {step}, so there is nothing to train up to step {end}",
            hint=f"name a later one: {command} --max-steps {2 * step}",
        )
    if 0 < settings.early_stopping_evals <= stale_evals:
        key = "training.early_stopping_evals"
        raise UsageError(
            f"{run.name} ended early, as {key} says, and would end again at once",
            hint=f"train on without it: {command} --max-steps {end} --set {key}=0 --allow-change {key}",
        )


def end_text(step: int, changes: Changes, settings: TrainingSettings) -> str | None:
    """Return what another end does to the learning rate after ``step``; None where the end is the same."""
    if not step or _STEPS not in changes.forced:
        return None
    old = int(json.loads(changes.forced[_STEPS][0]))
    before = learning_rate_at(step - 1, settings.model_copy(update={"max_steps": old}))
    after = learning_rate_at(step, settings)
    return (
        f"the run ends at step {settings.max_steps:,}, no longer at {old:,}, and its {settings.schedule} schedule is stretched "
        f"to that: the learning rate was {before:.3g} at step {step:,} and is {after:.3g} at step {step + 1:,}"
    )
