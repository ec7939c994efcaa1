"""Early stopping as a function of the run's state: when held-out loss falls no more, and what was best."""

import math
from dataclasses import replace

from sftcli.config.training_settings import TrainingSettings
from sftcli.training.state import TrainState


def with_heldout(state: TrainState, loss: float, settings: TrainingSettings) -> TrainState:
    """Return ``state`` after a held-out loss was measured at its step.

    An evaluation is stale when it is not at least ``early_stopping_improvement`` below the last one that was not.
    """
    best, first, level = state.best_heldout_loss, state.first_heldout_loss, state.fresh_heldout_loss
    is_best = math.isfinite(loss) and (best is None or loss < best)
    is_fresh = math.isfinite(loss) and (level is None or loss < level - settings.early_stopping_improvement)
    return replace(
        state,
        first_heldout_loss=loss if first is None else first,
        last_heldout_loss=loss,
        last_heldout_step=state.step,
        best_heldout_loss=loss if is_best else best,
        best_step=state.step if is_best else state.best_step,
        fresh_heldout_loss=loss if is_fresh else level,
        stale_evals=0 if is_fresh else state.stale_evals + 1,
    )


def has_plateaued(state: TrainState, settings: TrainingSettings) -> bool:
    """Tell whether the settings end the run because of its last evaluations."""
    return 0 < settings.early_stopping_evals <= state.stale_evals


def is_new_best(state: TrainState, settings: TrainingSettings) -> bool:
    """Tell whether the state of this step has to be kept because it is the best so far and may become final."""
    return bool(settings.early_stopping_evals) and 0 < state.step == state.best_step
