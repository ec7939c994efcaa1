"""Which step's weights become the final model."""

from sftcli.config.schema.training import TrainingSettings
from sftcli.events import EventSink, Notice, Warned
from sftcli.services.runs.folder import RunFolder
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.trainer import Trainer


def take_best(trainer: Trainer, run: RunFolder, settings: TrainingSettings, emit: EventSink) -> None:
    """Bring the trainer to the checkpoint with the lowest held-out loss where the settings ask for early stopping.

    Raises:
        DataError: That checkpoint is damaged.
    """
    state = trainer.state
    if not settings.early_stopping_evals or state.best_step == state.step:
        return
    if not state.best_step:
        emit(
            Warned(
                text="held-out loss was lowest before training; final/ holds the last step. Lower "
                "training.learning_rate, or mix in pretraining text"
            )
        )
        return
    found = [path for path in list_checkpoints(run.checkpoints) if step_of(path) == state.best_step]
    if not found:
        emit(Warned(text=f"step {state.best_step} was best but was not saved; final/ holds the last step"))
        return
    trainer.restore(read_snapshot(found[0]))
    emit(
        Notice(
            text=f"final/ takes step {state.best_step}: its held-out loss {state.best_heldout_loss:.4f} is the lowest"
        )
    )
