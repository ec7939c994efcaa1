"""The models that runs have made, and why there is none yet: a run that still trains is no run that ended."""

from pathlib import Path

from sftcli.errors import NotFoundError
from sftcli.events import FitStarted, StepDone
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder, list_runs, newest_run
from sftcli.services.runs.lock import LOCK, is_held
from sftcli.training.checkpoint.names import list_checkpoints


def model_of(run: RunFolder) -> Path:
    """Return the folder of the final model, or of the newest checkpoint while the run is unfinished.

    Raises:
        NotFoundError: The run has none yet.
    """
    run.require_weights()
    if run.is_finished:
        return run.final
    if checkpoints := list_checkpoints(run.checkpoints):
        return checkpoints[-1]
    require_ended(run)
    raise NotFoundError(
        f"run {run.name} has no model yet: it ended before its first checkpoint",
        hint=f"resume it: sft resume {run.argument}",
    )


def newest_finished(root: Path) -> RunFolder:
    """Return the newest finished run.

    Raises:
        NotFoundError: There is none; names one that still trains.
    """
    try:
        return newest_run(root, finished=True)
    except NotFoundError:
        for run in list_runs(root):
            require_ended(run)
        raise


def require_ended(run: RunFolder) -> None:
    """Make sure that no process trains ``run``, whose final model is missing.

    Raises:
        NotFoundError: One does.
    """
    if is_held(run.path / LOCK):
        raise NotFoundError(
            f"run {run.name} {_progress(run)}: it has no final model yet",
            hint=f"wait for its end, and see meanwhile how it goes: sft show {run.argument}",
        )


def _progress(run: RunFolder) -> str:
    step = last = 0
    for event in read_events(run):
        if isinstance(event, StepDone):
            step = event.step
        elif isinstance(event, FitStarted):
            last = event.last_step
    return f"is at step {step:,} of {last:,} and still training" if last else "has only begun to start"
