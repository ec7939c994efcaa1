"""The state of a run, and the interfaces of a plan, a store and a scorer that the loop uses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sftcli.copies import HostCopies
from sftcli.data.batches.batch import Batch
from sftcli.events import HeldoutAnswers, StopFlag
from sftcli.training.loss import NllSum


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Counters of a run. The data position follows from ``step`` (see ``BatchPlan``)."""

    step: int = 0  # optimizer steps finished, skipped ones included
    bad_steps: int = 0  # skipped ones in a row, up to now
    tokens: int = 0  # fed to the model, padding excluded
    response_tokens: int = 0  # of instruction rows
    text_tokens: int = 0  # of pretraining text
    first_heldout_loss: float | None = None
    first_heldout_rows: list[float] | None = None  # its nats by row
    last_heldout_loss: float | None = None
    last_heldout_step: int = -1  # of ``last_heldout_loss``
    best_heldout_loss: float | None = None
    best_step: int = 0
    fresh_heldout_loss: float | None = None  # the last one that was better by enough (see ``stopping``)
    stale_evals: int = 0  # since then
    asks: bool | None = None  # whether held-out prompts are answered; None while that is open
    # Scores of the held-out answers at the evaluations of the losses above; None where none were given.
    first_score: float | None = None
    last_score: float | None = None
    best_score: float | None = None
    fresh_score: float | None = None
    # Of the rows that each earlier run held out, before the first step: nats by row, and whether its answer is right.
    first_earlier_rows: list[list[float]] | None = None
    first_earlier_right: list[list[bool]] | None = None
    micro_batch_size: int = 0  # rows, where memory ran out with what the settings say; else 0
    checkpoints_activations: bool = False  # the same for gradient checkpointing
    checkpointing: str = ""  # how, a value of ``Checkpointing``
    # Of float16 products: by what the loss is multiplied, 0 where none was yet, and the steps since it was last changed.
    loss_scale: float = 0.0
    loss_scale_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RngState:
    """The state of every random generator that training can draw from, as plain tensors.

    ``python`` and ``numpy`` are int64 words of the Mersenne twister followed by its position; ``torch`` and ``device``
    are the byte states of torch's generators (``device`` is empty without CUDA).
    """

    python: Tensor
    numpy: Tensor
    torch: Tensor
    device: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which of how many parts, counted from 0. There is one for each process."""

    number: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSnapshot:
    """Everything that a run needs to resume bit for bit, taken between two steps.

    Where several processes save it together, each has some of its tensors: its ``part``.
    """

    state: TrainState
    weights: Mapping[str, torch.Tensor]  # by name: float32 masters, the rest and buffers as loaded
    optimizer: Mapping[str, torch.Tensor]
    rng: RngState
    peers: tuple[RngState, ...] = ()  # the random states of the second process and those after it
    part: Part = Part()

    def copied(self, copies: HostCopies) -> "TrainingSnapshot":
        """Return a copy in the CPU's memory by ``copies``, which say what must come before the next update and before it is read."""
        parts = (self.weights, self.optimizer)
        weights, optimizer = ({k: copies.copy(v) for k, v in part.items()} for part in parts)
        return replace(self, weights=weights, optimizer=optimizer)


class CheckpointStore(Protocol):
    """Keeps snapshots."""

    def save(self, snapshot: TrainingSnapshot, /) -> str:
        """Make the snapshot durable and return its path; it survives a crash once this returns."""
        ...


class ForgetfulStore:
    """The store of a rank other than 0, which saves nothing."""

    def save(self, snapshot: TrainingSnapshot, /) -> str:  # noqa: ARG002
        """Keep nothing."""
        return ""


class StepPlan(Protocol):
    """Says which micro-batches make which step."""

    @property
    def micro_batch_tokens(self) -> int:
        """Maximum positions of a micro-batch of packed rows; 0 if its number of rows is limited instead."""
        ...

    def window(self, step: int, /) -> Sequence[Batch]:
        """Return the micro-batches of the step after ``step`` finished ones; each has a response token."""
        ...

    def epoch(self, step: int, /) -> float:
        """Return the passes over the data after ``step`` finished steps."""
        ...


HeldoutLoss = Callable[[StopFlag], NllSum | None]  # None when it was told to stop


class AnswerGiver(Protocol):
    """Answers the same held-out prompts whenever it is asked, with the model in training. All processes must ask together."""

    @property
    def measure(self) -> str:
        """What says which answers are right."""
        ...

    def is_cheap(self, *, evaluations: int) -> bool:
        """Return whether so many evaluations take little of the training's time by it; true where answers were asked for."""
        ...

    def __call__(self, stop: StopFlag, /) -> HeldoutAnswers | None:
        """Answer; None when it was told to stop."""
        ...
