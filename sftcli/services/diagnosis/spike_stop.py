"""Ends a run whose loss spikes and stays high, if the settings request it."""

from dataclasses import dataclass

from sftcli.config.schema.training import OnSpike, TrainingSettings
from sftcli.errors import DivergedError
from sftcli.events import StopFlag
from sftcli.services.diagnosis.monitor import FitWatch
from sftcli.services.runs.folder import RunFolder
from sftcli.training.checkpoint.names import list_checkpoints, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeStop:
    """The flag ``stop``, also set when ``watch`` sees a loss that spiked and stays high, if ``settings`` request it."""

    stop: StopFlag
    watch: FitWatch
    settings: TrainingSettings

    def requested(self) -> bool:
        """Return whether to stop."""
        return self.stop.requested() or self.is_non_finite

    def save_requested(self) -> bool:
        """Return whether to save and continue."""
        return self.stop.save_requested()

    @property
    def is_non_finite(self) -> bool:
        """Whether the loss caused the stop."""
        return self.settings.on_spike is OnSpike.STOP and self.watch.is_non_finite

    def refuse_spoilt(self, run: RunFolder, step: int) -> None:
        """Raise if the loss stopped the run after ``step``.

        Raises:
            DivergedError: It was.
        """
        if not self.is_non_finite or self.stop.requested():
            return
        first = step - self.watch.high_steps + 1
        before = [at for at in map(step_of, list_checkpoints(run.checkpoints)) if at < first]
        slower = "--set training.learning_rate=... --allow-change training.learning_rate"
        back = (
            f"to resume from before the spike with a lower learning rate: sft resume {run.argument} --checkpoint {before[-1]} {slower}"
            if before
            else "there is no checkpoint from before the spike (see checkpoint.keep_every_steps)"
        )
        raise DivergedError(
            f"the loss spiked at step {first} and stayed high; stopped after step {step} and saved",
            hint=f"check the rows named above; {back}. To continue anyway: sft resume {run.argument}",
        )
