"""How long a step takes: trial steps of a trainer, and what they say of those of the whole run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median

from sftcli.events import StopFlag
from sftcli.runtime import monotonic
from sftcli.training.random_streams import capture_rng, restore_rng
from sftcli.training.trainer import Trainer

SAMPLED_STEPS, SAMPLE_SECONDS = 100, 2.0  # for the mean size of a step: so many or so long
_GOLDEN = 0.6180339887  # its multiples spread evenly over a run, however many of them are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """A step of ``positions`` tokens, padding included, and how long it took."""

    positions: int
    seconds: float


Enough = Callable[[Sequence[TimedStep]], bool]


def time_steps(
    trainer: Trainer, *, last_step: int, enough: Enough, stop: StopFlag | None = None
) -> list[TimedStep]:
    """Take steps from all over a run of ``last_step`` steps until one process has ``enough``, or ``stop`` is set."""
    taken: list[TimedStep] = []
    while not trainer.group.any(enough(taken)) and not (stop is not None and stop.requested()):
        place = _place(len(taken), last_step)
        trainer.state = replace(trainer.state, step=place, bad_steps=0)
        positions = _positions(trainer, place)
        taken.append(TimedStep(positions=positions, seconds=trainer.take_step().seconds))
    return taken


def step_seconds(trainer: Trainer, taken: Sequence[TimedStep], *, last_step: int) -> float:
    """Return what a mean step of a run takes: the median pace of those ``taken``, at the mean size of a step.

    The first one stays out where there are others: kernels and memory are made ready in it.
    """
    paces = [step.seconds / step.positions for step in taken[1:] or taken]
    return median(paces) * _mean_positions(trainer, last_step)


@contextmanager
def leaving_nothing(trainer: Trainer) -> Iterator[None]:
    """Let steps in the block move no weight, and take back all else that they moved, but for memory that was eased."""
    settings, state, rng = trainer.settings, trainer.state, capture_rng()
    trainer.settings = settings.model_copy(update={"learning_rate": 0.0})
    try:
        yield
    finally:
        trainer.settings = settings
        trainer.optimizer.state.clear()
        trainer.state = replace(
            state,
            micro_batch_size=trainer.state.micro_batch_size,
            checkpoints_activations=trainer.state.checkpoints_activations,
            checkpointing=trainer.state.checkpointing,
        )
        restore_rng(rng)


def _place(count: int, last_step: int) -> int:
    return int(last_step * (count * _GOLDEN % 1))


def _mean_positions(trainer: Trainer, last_step: int) -> float:
    begin, sampled = monotonic(), [_positions(trainer, 0)]
    while len(sampled) < min(SAMPLED_STEPS, last_step) and monotonic() - begin < SAMPLE_SECONDS:
        sampled.append(_positions(trainer, _place(len(sampled), last_step)))
    return fmean(sampled)


def _positions(trainer: Trainer, step: int) -> int:
    return sum(batch.input_ids.numel() for batch in trainer.plan.window(step))
