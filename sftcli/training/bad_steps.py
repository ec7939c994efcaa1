"""Steps whose loss or gradient is not finite: what is said of them, and when there were too many."""

import math
from collections.abc import Callable, Sequence

from sftcli.config.training_settings import TrainingSettings
from sftcli.data.batches.batch import Batch
from sftcli.errors import DivergedError
from sftcli.events import Warned
from sftcli.training.state import TrainState

SHOWN_ROWS = 8


def named_rows(window: Sequence[Batch], name_row: Callable[[int], str]) -> str:
    """Return in words which rows a step is made of."""
    ids = sorted(index for batch in window for index in batch.example_ids)
    more = f" and {len(ids) - SHOWN_ROWS} more" if len(ids) > SHOWN_ROWS else ""
    return ", ".join(map(name_row, ids[:SHOWN_ROWS])) + more


def bad_step(step: int, *, loss: float, grad_norm: float, rows: str) -> Warned:
    """Return what is told of a step that was skipped."""
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
            hint="look at the model with sft generate, and at the training rows named above",
        )
    if state.bad_steps >= settings.max_bad_steps:
        raise DivergedError(
            f"{state.bad_steps} steps in a row gave no finite loss or gradient, the last one at step {state.step}",
            hint="lower training.learning_rate, or look at the training rows named above",
        )
