"""What steps of a real trainer cost in memory and time: the measurements behind a plan. The trainer is spent afterwards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sftcli.data.batches.batch import Batch
from sftcli.events import Progressed
from sftcli.runtime import (
    body_of,
    held_peak_bytes,
    memory_bytes,
    monotonic,
    peak_memory_bytes,
    reset_peak_memory,
)
from sftcli.training.loss import nll_of
from sftcli.training.optim.optimizer import optimizer_tensors
from sftcli.training.probes.pace import TimedStep, step_seconds, time_steps
from sftcli.training.trainer import Trainer

SCAN_SECONDS = 5.0  # for the longest micro-batch
TIMED_STEPS, TIMED_SECONDS = 4, 20.0  # for the time of a step: so many or so long


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Bytes and seconds. ``activations`` and ``head`` are those of the longest micro-batch."""

    longest_rows: int
    longest_tokens: int  # padding included
    scanned_steps: int  # in which the longest micro-batch was looked for
    weights: int  # masters and what the products run in
    gradients: int
    optimizer: int
    activations: int
    head: int  # above the activations, while head and loss run
    peak: int  # of the process, or of the device where it has memory of its own
    step_seconds: float
    forward_seconds_per_token: float


@dataclass(slots=True)
class _Marks:
    """Memory and time inside a forward pass, of the newest one; ``peak`` is that of all."""

    before: int = 0
    body: int = 0
    head: int = 0
    peak: int = 0
    seconds: float = 0.0

    def rise(self, peak: int) -> None:
        """Remember a peak: the meter is set back inside each pass."""
        self.peak = max(self.peak, peak)


class _Repeated:
    """A plan whose every step is one micro-batch, ``times`` over: the second finds gradients in memory."""

    def __init__(self, batch: Batch, times: int, micro_batch_tokens: int) -> None:
        self.batch = batch
        self.times = times
        self.micro_batch_tokens = micro_batch_tokens

    def window(self, step: int, /) -> list[Batch]:  # noqa: ARG002
        return [self.batch] * self.times

    def epoch(self, step: int, /) -> float:
        return float(step)


def measure_cost(trainer: Trainer, *, last_step: int) -> StepCost:
    """Take real steps for time, then one on the longest micro-batch for memory: with all state and the usual kernels there."""
    longest, scanned = longest_micro_batch(trainer, last_step, size=lambda batch: batch.input_ids.numel())
    step_seconds = _step_seconds(trainer, last_step)
    plan = trainer.plan
    releases = trainer.release is not None and trainer.release.is_for(plan.window(0))
    trainer.plan = _Repeated(
        longest, times=min(2, len(plan.window(0))), micro_batch_tokens=plan.micro_batch_tokens
    )
    with _marked(trainer) as marks:
        reset_peak_memory(trainer.device)
        trainer.take_step()
        marks.rise(held_peak_bytes(trainer.device))
    _tell(trainer, TIMED_STEPS + 1)
    trainer.plan = plan
    masters, remainders = trainer.weights.masters, trainer.weights.remainders
    state = optimizer_tensors(trainer.optimizer, masters).values()
    return StepCost(
        longest_rows=len(longest.example_ids),
        longest_tokens=longest.input_ids.numel(),
        scanned_steps=scanned,
        weights=_bytes([*trainer.weights.model.parameters(), *masters.values(), *remainders.values()]),
        gradients=0 if releases else sum(4 * master.numel() for master in masters.values()),  # in float32
        optimizer=_bytes(state),
        activations=max(0, marks.body - marks.before),
        head=max(0, marks.head - marks.body),
        peak=marks.peak,
        step_seconds=step_seconds,
        forward_seconds_per_token=marks.seconds / longest.input_ids.numel(),
    )


def longest_micro_batch(
    trainer: Trainer, last_step: int, *, size: Callable[[Batch], int]
) -> tuple[Batch, int]:
    """Return the micro-batch of the greatest ``size`` in the run, or in as many of its steps as a few seconds allow."""
    begin, found, step = monotonic(), trainer.plan.window(0), 1
    longest = max(found, key=size)
    while step < last_step and monotonic() - begin < SCAN_SECONDS:
        longest = max([longest, *trainer.plan.window(step)], key=size)
        step += 1
    return longest, step


def _step_seconds(trainer: Trainer, last_step: int) -> float:
    """Return the time of a step, from a few real ones."""

    def enough(taken: Sequence[TimedStep]) -> bool:
        _tell(trainer, len(taken))
        return len(taken) >= TIMED_STEPS or sum(step.seconds for step in taken) >= TIMED_SECONDS

    return step_seconds(trainer, time_steps(trainer, last_step=last_step, enough=enough), last_step=last_step)


def _tell(trainer: Trainer, done: int) -> None:
    trainer.emit(Progressed(task="measuring", done=done, total=TIMED_STEPS + 1, unit="steps"))


@contextmanager
def _marked(trainer: Trainer) -> Iterator[_Marks]:
    marks, loss = _Marks(), trainer.batch_loss
    body = body_of(trainer.weights.model)

    def after_body(*_: object) -> None:
        marks.rise(peak_memory_bytes(trainer.device))
        marks.body = memory_bytes(trainer.device)
        reset_peak_memory(trainer.device)

    def measured(batch: Batch) -> torch.Tensor:
        begin = monotonic()
        marks.before = memory_bytes(trainer.device)
        sums = loss(batch)
        nll_of(sums).item()  # waits for the device
        marks.seconds = monotonic() - begin
        marks.head = peak_memory_bytes(trainer.device)
        marks.rise(marks.head)
        return sums

    hook = body.register_forward_hook(after_body)
    trainer.batch_loss = measured
    try:
        yield marks
    finally:
        hook.remove()
        trainer.batch_loss = loss


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the size of ``tensors``, memory that several share counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
