"""Loss scaling: what keeps gradients in float16's range.

float16 has numbers from 6e-8 to 65504. Gradients of a mean loss are smaller than that and would be zero, so the loss is
multiplied before the backward pass and the float32 gradients of the masters are divided after it, by a power of two, which
rounds nothing (Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740). Where a gradient leaves the range
upwards, the step is computed again with half the scale: no row is passed over, and no step is a bad one for it.
"""

from dataclasses import replace

import torch

from sftcli.events import EventSink, Notice
from sftcli.training.distributed.group import Group
from sftcli.training.state import TrainState
from sftcli.training.weights.masters import MasterWeights
from sftcli.training.weights.placement import local_part

FIRST = 2.0**16
GROW_AFTER = 2000  # steps without an overflow, after which it is tried whether twice the scale does


class LossScaler:
    """The scale of a run whose products are float16; of any other it is 1 and nothing is done."""

    def __init__(self, weights: MasterWeights, group: Group, emit: EventSink) -> None:
        self.weights = weights
        self.group = group
        self.emit = emit
        self.is_on = weights.compute_dtype == torch.float16

    def scale(self, state: TrainState) -> float:
        """Return by what the loss of the step behind ``state`` is multiplied."""
        return (state.loss_scale or FIRST) if self.is_on else 1.0

    def settle(self, state: TrainState, sums: torch.Tensor) -> tuple[TrainState, bool]:
        """Divide the gradients of a step by its scale; return the state with the next scale, and whether the step holds.

        It does not where gradients are not finite and the loss, in ``sums``, is: half the scale may do. What is not finite at a
        scale of 1, or has no finite loss, is a bad step.
        """
        if not self.is_on:
            return state, True
        scale = self.scale(state)
        gradients = self._gradients()
        torch._foreach_mul_(gradients, 1 / scale)
        is_finite = bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
        if not self.group.any(not is_finite):
            return _after_good_step(state, scale), True
        if scale <= 1 or not sums.isfinite().all():
            return replace(state, loss_scale=scale, loss_scale_steps=0), True
        self.emit(
            Notice(
                text=f"step {state.step + 1}: gradients leave the range of float16, the loss is scaled by {scale / 2:,.0f} "
                "from here on; the step is computed again"
            )
        )
        return replace(state, loss_scale=scale / 2, loss_scale_steps=0), False

    def _gradients(self) -> list[torch.Tensor]:
        """Return the gradients of the masters, of each the part that this process holds."""
        found = [master.grad for master in self.weights.masters.values() if master.grad is not None]
        return [local_part(gradient) for gradient in found] if self.weights.is_sharded else found


def _after_good_step(state: TrainState, scale: float) -> TrainState:
    steps = state.loss_scale_steps + 1
    if steps < GROW_AFTER:
        return replace(state, loss_scale=scale, loss_scale_steps=steps)
    return replace(state, loss_scale=2 * scale, loss_scale_steps=0)
