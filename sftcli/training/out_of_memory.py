"""Running out of memory: the ladder of fallbacks that keeps the updates the same, and freed memory that is kept."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sftcli.config.schema.training import Checkpointing
from sftcli.events import MemoryEased
from sftcli.runtime import memory_bytes, release_memory
from sftcli.training.state import StepPlan, TrainState

SPARE = 1.1
_WORDS = {
    Checkpointing.SELECTIVE: "selective gradient checkpointing",
    Checkpointing.LAYERS: "gradient checkpointing",
    Checkpointing.OFFLOAD: "gradient checkpointing with activations in the memory of the host",
}


class KeptMemory:
    """Returns freed memory to the system once it exceeds what the next steps can use.

    Blocks of a step go into the gaps that those before left, as far as they fit; what does not fit is added, and gaps
    remain. So what a process holds grows, by a little in each step. It may become ``SPARE`` of what a step held that began
    without gaps.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        used: Callable[[torch.device], int] = memory_bytes,
        release: Callable[[torch.device], None] = release_memory,
    ) -> None:
        self._device = device
        self._used = used
        self._release = release
        self._most = 0.0
        self._is_without_gaps = True  # at the start of the newest step

    def after_step(self) -> None:
        """Return excess memory of the process to the system."""
        if self._device.type != "cpu":
            return
        used = self._used(self._device)
        if self._is_without_gaps:
            self._most, self._is_without_gaps = max(self._most, SPARE * used), False
        elif used > self._most:
            self._release(self._device)
            self._is_without_gaps = True


class MemoryLadder:
    """The rungs: half the micro-batch with more of them, down to one row, then the ways of gradient checkpointing.

    Each of those keeps less than the one before.
    Where rows are packed, half the micro-batch is half its positions, down to the part of them that one of
    ``micro_batch_size`` rows has.
    The global batch stays, so losses and updates are the same up to rounding. The rung is part of the run's state.

    Args:
        micro_batch_size: What the settings say.
        make_plan: Returns the plan for a micro-batch size.
        ways: Those of gradient checkpointing that keep less than the settings say, as far as the model knows them.
        checkpoint: Makes the model keep what one says.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        make_plan: Callable[[int], StepPlan],
        ways: Sequence[Checkpointing] = (),
        checkpoint: Callable[[Checkpointing], None] | None = None,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self.make_plan = make_plan
        self.ways = ways
        self.checkpoint = checkpoint
        self.is_short = False  # whether it ends where it begins
        self._way: Checkpointing | None = None  # that the model was given

    def below(self, state: TrainState) -> TrainState | None:
        """Return ``state`` one rung further down; None at the end of the ladder."""
        size = self._size(state)
        if self.is_short:
            return None
        if size > 1:
            return replace(state, micro_batch_size=size // 2)
        way = _way_of(state)
        left = self.ways if way is None else [*self.ways][[*self.ways, way].index(way) + 1 :]
        if left:
            return replace(state, checkpoints_activations=True, checkpointing=left[0])
        return None

    def plan(self, state: TrainState) -> StepPlan:
        """Return the plan of the rung that ``state`` is on, with the model made ready for it."""
        way = _way_of(state)
        if way is not None and way is not self._way and self.checkpoint is not None:
            self.checkpoint(way)
            self._way = way
        return self.make_plan(self._size(state))

    def event(self, state: TrainState, plan: StepPlan, *, why: str) -> MemoryEased:
        """Return the event that reports the step-down, and ``why`` the step behind ``state`` needs it."""
        count = len(plan.window(state.step))
        what = f"{self._micro_batches(state, plan)} from here on, {count} in this step"
        if way := _way_of(state):
            what = f"{_WORDS[way]} from here on"
        return MemoryEased(
            step=state.step + 1,
            micro_batch_size=0 if plan.micro_batch_tokens else self._size(state),
            micro_batch_tokens=plan.micro_batch_tokens,
            micro_batches=count,
            gradient_checkpointing=state.checkpoints_activations,
            text=f"step {state.step + 1} {why}: {what}; the global batch stays",
        )

    def tried(self, state: TrainState, plan: StepPlan) -> str:
        """Describe the rung of ``state``, whose plan is ``plan``."""
        micro_batches = self._micro_batches(state, plan)
        way = _way_of(state) or (None if self.ways else Checkpointing.LAYERS)
        return f"{micro_batches} and {_WORDS[way]}" if way else micro_batches

    def way_down(self, state: TrainState, plan: StepPlan) -> str:
        """Return the setting, ``KEY=VALUE``, of the next rung for a run that cannot change rungs itself; empty if none is left."""
        if not self.is_short:
            return ""
        size = self._size(state)
        if size > 1 and not plan.micro_batch_tokens:
            return f"training.micro_batch_size={size // 2}"
        return f"training.gradient_checkpointing={self.ways[0]}" if self.ways else ""

    def _micro_batches(self, state: TrainState, plan: StepPlan) -> str:
        if plan.micro_batch_tokens:
            return f"micro-batches of {plan.micro_batch_tokens:,} tokens of packed rows"
        size = self._size(state)
        return f"micro-batches of {size} {'row' if size == 1 else 'rows'}"

    def _size(self, state: TrainState) -> int:
        return state.micro_batch_size or self.micro_batch_size


def _way_of(state: TrainState) -> Checkpointing | None:
    """Return how ``state`` checkpoints activations; None where it does as the settings say."""
    if not state.checkpoints_activations:
        return None
    return Checkpointing(state.checkpointing or Checkpointing.LAYERS)  # older runs know this one alone
