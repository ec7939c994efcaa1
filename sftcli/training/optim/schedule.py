"""The learning rate of each step."""

import math
from typing import TYPE_CHECKING

from sftcli.config.schema.training import Schedule, TrainingSettings

if TYPE_CHECKING:
    import torch


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of the step after ``step`` finished ones: linear warm-up, then the schedule.

    It falls from the peak to ``min_learning_rate_fraction`` of it.
    """
    warmup = settings.num_warmup_steps
    if step < warmup:
        return settings.peak_learning_rate * (step + 1) / warmup
    height, floor = _schedule_factor(step, settings), settings.min_learning_rate_fraction
    return settings.peak_learning_rate * (floor + (1 - floor) * height)


def _schedule_factor(step: int, settings: TrainingSettings) -> float:
    """Return where the schedule stands between 1 after warm-up and 0 at ``max_steps``.

    Cosine is ``(1 + cos(pi * p)) / 2`` with ``p`` from 0 after warm-up to 1 at the end (Loshchilov and Hutter 2017, SGDR,
    one cycle). WSD falls as ``1 - sqrt(q)`` with ``q`` from 0 to 1 over the last steps (Haegele et al. 2024, Scaling Laws
    and Compute-Optimal Training Beyond Fixed Training Durations).
    """
    progress = (step - settings.num_warmup_steps) / max(1, settings.max_steps - settings.num_warmup_steps)
    match settings.schedule:
        case Schedule.COSINE:
            return (1 + math.cos(math.pi * progress)) / 2
        case Schedule.LINEAR:
            return 1 - progress
        case Schedule.CONSTANT:
            return 1.0
        case Schedule.WSD:
            steps = min(
                max(1, round(settings.max_steps * settings.decay_fraction)),
                max(1, settings.max_steps - settings.num_warmup_steps),
            )
            return 1 - math.sqrt(max(0, step - (settings.max_steps - steps)) / steps)


def set_learning_rate(optimizer: "torch.optim.Optimizer", learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
