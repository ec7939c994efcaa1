"""The score of each row by a model's own logits: of one that is only read, and of one that goes on training."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from sftcli.data.batches.batch import IGNORED, Batch
from sftcli.events import StopFlag
from sftcli.training.distributed.group import Group
from sftcli.training.loss import in_halves

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScore:
    """One row: negative log-likelihood in nats summed over its ``tokens`` response tokens, ``correct`` of them guessed."""

    nll: float
    tokens: int
    correct: int


@torch.inference_mode()
def score_rows(
    model: "PreTrainedModel", batches: Iterable[Batch], *, stop: StopFlag
) -> dict[int, RowScore] | None:
    """Return the score of every row by its example id; None when ``stop`` was set before the end.

    Sums run in float64, row by row, over the model's own logits.
    """
    scores: dict[int, RowScore] = {}
    for batch in batches:
        if stop.requested():
            return None
        for _, found in in_halves(partial(_scores, model), batch):
            scores |= found
    return scores


@torch.no_grad()
def score_rows_together(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    *,
    num_rows: int,
    stop: StopFlag,
    group: Group,
    device: torch.device,
    computes_all: bool,
) -> list[RowScore] | None:
    """Return the scores of all rows, whose ids count from 0, in every process of ``group``; as ``heldout_nll`` shares them.

    It is for a model that goes on training: nothing is left behind in it that gradients could not flow through.
    """
    found = np.zeros((3, num_rows))
    is_whole = computes_all or group.parts > 1
    for batch, is_own in group.batches(batches):
        if stop.requested():
            return None
        if not (is_own or computes_all):
            continue
        batch = batch.to(device)
        parts = list(in_halves(partial(_scores, model), batch, is_whole=is_whole))
        for row, score in chain.from_iterable(part.items() for _, part in parts) if is_own else ():
            found[:, row] = score.nll, score.tokens, score.correct
    nll, tokens, correct = np.asarray(group.sum(found.ravel().tolist())).reshape(3, num_rows).tolist()
    return [
        RowScore(nll=one, tokens=int(count), correct=int(guessed))
        for one, count, guessed in zip(nll, tokens, correct, strict=True)
    ]


def _scores(model: "PreTrainedModel", batch: Batch) -> dict[int, RowScore]:
    scores: dict[int, RowScore] = {}
    logits = model(**batch.inputs, use_cache=False).logits  # (B, T, V)
    for row, example in enumerate(batch.example_ids):
        wanted = batch.targets[row] != IGNORED
        chosen, targets = logits[row][wanted].float(), batch.targets[row][wanted]
        nll = functional.cross_entropy(chosen, targets, reduction="none").double().sum()
        scores[example] = RowScore(
            nll=float(nll),
            tokens=len(targets),
            correct=int((chosen.argmax(dim=-1) == targets).sum()),
        )
    return scores
