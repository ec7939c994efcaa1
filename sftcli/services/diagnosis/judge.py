"""The verdict on a run from what its log holds."""

from sftcli.events import EarlierDone
from sftcli.services.diagnosis.forgetting import judged_with
from sftcli.services.diagnosis.verdict import Again, Measured, Verdict, judge_losses
from sftcli.services.runs.earlier import kept_of
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.summary import RunHistory


def judge_run(run: RunFolder, history: RunHistory) -> Verdict:
    """Return the verdict on ``run``, whose events ``history`` has."""
    measured = [
        Measured(step=event.step, loss=event.loss, fall_error=event.fall_error) for event in history.heldout
    ]
    again = Again(run=run, settings=read_settings(run))
    own = judge_losses(history.losses, measured, again, rows=history.heldout_rows)
    return judged_with(kept_of(history.of(EarlierDone)), own, again)
