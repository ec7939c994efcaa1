"""Loss and right guesses of every row by itself, as exact sums that do not depend on how rows are batched."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from sftcli.data.batches.batch import IGNORED, Batch
from sftcli.events import StopFlag

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
