"""How a run ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import TrainingSettings
from sftcli.data.quality.thresholds import LeftOut
from sftcli.events import Ending, EventSink, Notice, Warned
from sftcli.services.diagnosis.verdict import Verdict
from sftcli.services.runs.folder import RunFolder
from sftcli.training.checkpoint.format import read_snapshot
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from sftcli.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """How a run ended. Losses are nats per response token, the last one that of ``final``; None where nothing is held out."""

    run: str
    path: str
    ending: Ending
    step: int
    last_step: int
    first_heldout_loss: float | None
    last_heldout_loss: float | None
    last_heldout_step: int  # of that loss; -1 where there is none
    final: str | None  # folder of the tuned model; None when stopped before the end
    seconds: float
    heldout_rows: int = 0  # that both losses are of
    # What this start found changed: kind (machine, changes, allowed) -> name -> what it was and is.
    changed: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)
    left_out: LeftOut | None = None  # rows that this start did not train on; None where it took all
    verdict: Verdict | None = None  # on the curves of the run up to the step of ``final``


def outcome_of(
    run: RunFolder,
    settings: Settings,
    ending: Ending,
    step: int,
    losses: tuple[float | None, float | None],
    *,
    seconds: float,
) -> TrainOutcome:
    """Return the outcome of ``run`` at ``step``; ``losses`` are the first and last held-out loss."""
    return TrainOutcome(
        run=run.name,
        path=str(run.path),
        ending=ending,
        step=step,
        last_step=settings.training.max_steps,
        first_heldout_loss=losses[0],
        last_heldout_loss=losses[1],
        last_heldout_step=-1,
        final=str(run.final) if ending.is_complete else None,
        seconds=seconds,
    )


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
