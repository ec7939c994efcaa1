"""Whether processes can share rows of a model: tried on the model itself, with a few rows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sftcli.data.batches.batch import Batch, collate, collate_packed
from sftcli.data.example import Example
from sftcli.errors import Location, UsageError
from sftcli.memory_faults import Attempt
from sftcli.modeling.attention import attention_of, is_named
from sftcli.modeling.kernels.document_attention import (
    attend_by_document,
    attend_together,
    attends_by_document,
    overheard,
)
from sftcli.modeling.kernels.shared_rows import KEY
from sftcli.modeling.kernels.state_kernels import has_convolutions
from sftcli.training.distributed.group import Group
from sftcli.training.loss import BatchLoss, each_token
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.untouched import left_as_it_was

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORK = 8  # operations for a token and a weight: four passes forward
# Part by which the losses of tokens may differ from those of whole rows, where products have other shapes.
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1


def share_rows(
    model: "PreTrainedModel",
    rows: Sequence[Example],
    *,
    group: Group,
    batch_loss: BatchLoss,
    sharing: RowSharing,
    pad_id: int,
) -> None:
    """Let ``model`` compute parts of rows, whose attention the processes of ``group`` bring together.

    All of them must call it together. ``rows`` are tried packed and padded: each token must have the loss that it has where
    one process computes all of them.

    Raises:
        UsageError: It cannot, or its losses are others.
    """
    if reason := _obstacle(model, sharing):
        raise _cannot(model, reason)
    attend_together(model, group)
    wanted = [replace(row, loss_mask=np.ones_like(row.loss_mask)) for row in rows]
    ids = range(len(wanted))
    batches = [collate(wanted, example_ids=ids, pad_id=pad_id)]
    if sharing is RowSharing.BOUNDS:
        batches.append(collate_packed([wanted], example_ids=ids, pad_id=pad_id))
    weight = next(model.parameters())
    with left_as_it_was(model):
        model.train(False)
        found = [_difference(batch, model.device, batch_loss, group) for batch in batches]
    if not all(one <= _TOLERANCE.get(weight.dtype, _COARSE_TOLERANCE) for one in found):
        raise _cannot(model, "a part of the positions gets other losses than in a whole row")


def _obstacle(model: "PreTrainedModel", sharing: RowSharing) -> str:
    """Return why processes cannot share rows of ``model``, as far as it can be told without a pass; prepares its attention."""
    if has_convolutions(model):
        return "layers with a state or a convolution mix positions outside of attention"
    if sharing is RowSharing.MASK:
        return "its packed rows are kept apart by a mask, which one part of the positions does not have"
    if is_named(model):
        return f"model.attention names {attention_of(model)}, which sees one part of the positions; leave it auto"
    with Attempt():
        if attends_by_document(model) or attend_by_document(model):
            return ""
    return f"its attention is its own ({attention_of(model)})"


@torch.no_grad()
def _difference(batch: Batch, device: torch.device, batch_loss: BatchLoss, group: Group) -> float:
    """Return how far the losses of tokens in parts are from those in whole rows, as a part of how much these vary; NaN if unknown."""
    total = float("nan")
    with Attempt(), overheard() as heard:
        whole = _losses(batch, device, batch_loss)
        part = batch.part(group.part, group.parts)
        found = _losses(part, device, batch_loss)
        width = part.input_ids.shape[1]
        own = batch.loss_places % batch.input_ids.shape[1] // width == group.part
        squares = float((found - whole[own]).square().sum()) if heard.is_complete else total
        spread = float((whole - whole.mean()).square().sum())
        total = squares / spread
    return math.sqrt(group.sum([total])[0])


def _losses(batch: Batch, device: torch.device, batch_loss: BatchLoss) -> torch.Tensor:
    """Return the negative log-likelihood of each response token, (N,), in order."""
    with each_token() as heard:
        batch_loss(batch.to(device))
    return torch.cat([torch.empty(0), *(part.float().cpu() for part in heard)])


def _cannot(model: "PreTrainedModel", why: str) -> UsageError:
    return UsageError(
        f"processes cannot share rows of {type(model).__name__}: {why}",
        hint=f"set {KEY}=1; rows that do not fit into memory need less of it with training.gradient_checkpointing or --max-tokens",
        location=Location(key=KEY),
    )
