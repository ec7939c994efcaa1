"""Whether a training should stop: held-out loss that no longer improves, and steps whose numbers are not finite."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from sftcli.config.schema.training import BestBy, TrainingSettings
from sftcli.data.batches.batch import Batch
from sftcli.errors import DivergedError
from sftcli.events import Warned, rank_of
from sftcli.training.loss import NllSum
from sftcli.training.state import TrainState


def with_heldout(
    state: TrainState, scored: NllSum, settings: TrainingSettings, *, score: float | None = None
) -> TrainState:
    """Return ``state`` after a held-out loss was measured at its step, and the ``score`` of answers where some were given.

    An evaluation is stale when it is not better than the last one that was not: by ``metric_for_best``, and where only the loss
    differs, by at least ``early_stopping_improvement``.
    """
    loss, by_check = scored.loss, settings.metric_for_best is BestBy.CHECK
    best, first, level = state.best_heldout_loss, state.first_heldout_loss, state.fresh_heldout_loss

    def is_better(than: float | None, than_score: float | None, *, by: float = 0.0) -> bool:
        if not math.isfinite(loss):
            return False
        if than is None:
            return True
        scores = (score, than_score) if by_check else (None, None)
        return rank_of(loss, scores[0]) < rank_of(than - by, scores[1])

    is_best = is_better(best, state.best_score)
    is_fresh = is_better(level, state.fresh_score, by=settings.early_stopping_improvement)
    return replace(
        state,
        first_heldout_loss=loss if first is None else first,
        first_heldout_rows=list(scored.row_nll) if first is None else state.first_heldout_rows,
        last_heldout_loss=loss,
        last_heldout_step=state.step,
        best_heldout_loss=loss if is_best else best,
        best_step=state.step if is_best else state.best_step,
        fresh_heldout_loss=loss if is_fresh else level,
        stale_evals=0 if is_fresh else state.stale_evals + 1,
        first_score=score if first is None else state.first_score,
        last_score=score,
        best_score=score if is_best else state.best_score,
        fresh_score=score if is_fresh else state.fresh_score,
    )


def has_plateaued(state: TrainState, settings: TrainingSettings) -> bool:
    """Return whether the settings end the run because of its last evaluations."""
    return 0 < settings.early_stopping_evals <= state.stale_evals


def is_new_best(state: TrainState, settings: TrainingSettings) -> bool:
    """Return whether the state of this step must be saved because it is the best so far and may become final."""
    return bool(settings.early_stopping_evals) and 0 < state.step == state.best_step


SHOWN_ROWS = 8


def named_rows(window: Sequence[Batch], name_row: Callable[[int], str]) -> str:
    """Name the rows of a step."""
    ids = sorted(index for batch in window for index in batch.example_ids)
    more = f" and {len(ids) - SHOWN_ROWS} more" if len(ids) > SHOWN_ROWS else ""
    return ", ".join(map(name_row, ids[:SHOWN_ROWS])) + more


def bad_step(step: int, *, loss: float, grad_norm: float, rows: str) -> Warned:
    """Return the warning about a skipped step."""
    what, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
    return Warned(
        text=f"step {step} skipped: its {what} is {value}; weights are unchanged; training rows {rows}"
    )


def refuse_bad_steps(state: TrainState, settings: TrainingSettings) -> None:
    """End the run where too many steps in a row were skipped, or all that there are.

    Raises:
        DivergedError: There were ``max_bad_steps``, or the last step is over and none was applied.
    """
    if state.bad_steps == settings.max_steps:
        raise DivergedError(
            f"every step was skipped: none of {state.bad_steps} gave a finite loss and gradient, and nothing was trained",
            hint="check the model with sft generate, and the training rows named above",
        )
    if state.bad_steps >= settings.max_bad_steps:
        raise DivergedError(
            f"{state.bad_steps} steps in a row gave no finite loss or gradient, the last one at step {state.step}",
            hint="lower training.learning_rate, or check the training rows named above",
        )
