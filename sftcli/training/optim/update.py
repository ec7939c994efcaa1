"""The update of a step, which is left out where its loss or the norm of its gradients is not finite."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from sftcli.copies import Reading
from sftcli.training.optim.optimizer import clip_gradients, gradient_norm
from sftcli.training.weights.masters import MasterWeights
from sftcli.training.weights.placement import full_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a step came to: its ``sums`` as ``three_sums`` has them, the norm of its gradients, and whether it was applied."""

    sums: tuple[float, float, float]
    grad_norm: float
    applied: bool


def launch_update(
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    sums: torch.Tensor,
    *,
    max_norm: float,
    asks_device: bool,
) -> Callable[[], Taken]:
    """Launch the update of the masters of ``weights``; return what finishes it and waits for its numbers.

    Args:
        weights: Whose masters have the gradients of the step.
        optimizer: Of the masters.
        sums: Of the loss of the step, (3,).
        max_norm: What the gradients are clipped to.
        asks_device: Whether the device says if the numbers are finite, so that the host need not know them before it goes on.
            Only fused AdamW can be told there to leave a step out; for another optimizer the numbers are read first.
    """
    masters = weights.masters.values()
    norm = gradient_norm(masters)
    whole_norm = full_tensor(norm).to(sums)
    reading = Reading(torch.cat((sums, whole_norm.reshape(1))))
    is_launched = asks_device and not weights.is_sharded and _can_leave_out(optimizer)
    if is_launched:
        _step_if_finite(cast("torch.optim.AdamW", optimizer), sums[1], whole_norm, max_norm=max_norm)
        weights.publish()

    def finish() -> Taken:
        numbers = reading.numbers()
        minimized, nll, balance, grad_norm = numbers.tolist()
        applied = math.isfinite(nll) and math.isfinite(grad_norm)
        if applied and not is_launched:
            if numbers[-1] > max_norm:  # else there is no need to go over all of them again
                clip_gradients(masters, max_norm, norm)
            optimizer.step()
            weights.publish()
        return Taken(sums=(minimized, nll, balance), grad_norm=grad_norm, applied=applied)

    return finish


def _can_leave_out(optimizer: torch.optim.Optimizer) -> bool:
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    return is_adamw and all(group["fused"] for group in optimizer.param_groups)


def _step_if_finite(
    optimizer: torch.optim.AdamW, nll: torch.Tensor, norm: torch.Tensor, *, max_norm: float
) -> None:
    """Launch a step that changes nothing, its own state included, unless both numbers are finite.

    The kernel divides the gradients as well, which is how they are clipped: by 1 where their norm is small enough.
    """
    told = cast("Any", optimizer)  # the names are those that torch's scaler of gradients sets
    told.found_inf = (nll.isfinite() & norm.isfinite()).logical_not().float()
    told.grad_scale = ((norm + 1e-6) / max_norm).masked_fill_(norm <= max_norm, 1.0)
    try:
        optimizer.step()
    finally:
        told.found_inf = told.grad_scale = None
