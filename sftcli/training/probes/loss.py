"""Checks on the real model before training starts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.training import Loss
from sftcli.data.batches.batch import Batch
from sftcli.events import EventSink, Warned
from sftcli.memory_faults import Attempt
from sftcli.training.loss import BatchLoss, plain_nll_sum, response_nll_sum
from sftcli.training.probes.choices import HeadLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Two orders of summation in bfloat16 differ by less; a forgotten logit scale or cap moves the loss by far more.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenLoss:
    """The loss of a batch, and where its head runs."""

    kind: HeadLoss
    batch_loss: BatchLoss


@torch.no_grad()
def choose_batch_loss(
    model: "PreTrainedModel",
    batch: Batch,
    *,
    emit: EventSink,
    gathered: Callable[[BatchLoss], BatchLoss] = lambda batch_loss: batch_loss,
    recorded: str | None = None,
    loss: Loss = Loss.NLL,
) -> ChosenLoss:
    """Return the loss that runs the head on response positions only, if this model allows it.

    It goes round the model's own forward pass behind the last hidden state. On ``batch``, one short row, both must
    agree; otherwise the model does something there that is not known, and its own logits are used. ``gathered`` makes
    whole what a loss reads, where processes share the weights out. What is ``recorded`` as whole is not tried.
    """
    whole = ChosenLoss(kind=HeadLoss.WHOLE, batch_loss=lambda part: plain_nll_sum(model, part, loss))
    if recorded == HeadLoss.WHOLE:
        return whole
    lean_loss = gathered(lambda part: response_nll_sum(model, part, loss))
    model.train(False)
    plain = whole.batch_loss(batch)
    agree = False
    with Attempt():
        agree = torch.allclose(lean_loss(batch), plain, rtol=TOLERANCE, atol=TOLERANCE)
    if agree:
        return ChosenLoss(kind=HeadLoss.LEAN, batch_loss=lean_loss)
    emit(
        Warned(
            text=f"{type(model).__name__} has an unknown head: logits of whole batches are kept, which costs memory"
        )
    )
    return whole
