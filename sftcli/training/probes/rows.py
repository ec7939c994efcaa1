"""The rows of the probes: a few real ones, truncated to save time."""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from sftcli.data.batches.batch import ExampleSource
from sftcli.data.example import Example
from sftcli.training.loss import chunk_logits

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_MOST_TOKENS = 600  # of all rows together
_FEWEST_TOKENS = 48  # however large the model
_OPERATIONS = {"cpu": 6e10}  # that a trial may take: about half a second on two cores
_OPERATIONS_ELSEWHERE = 1e13


def cut_rows(
    model: "PreTrainedModel", examples: ExampleSource, *, work: int, count: int = 3
) -> list[Example]:
    """Return two or three rows, a long one first, cut to the end of their trained tokens.

    Args:
        model: Whose size says how many tokens are affordable.
        examples: Rows to choose from.
        work: Operations that are made for a token and a weight.
        count: How many rows.
    """
    weights = sum(weight.numel() for weight in model.parameters())
    operations = _OPERATIONS.get(model.device.type, _OPERATIONS_ELSEWHERE)
    embedding = cast("torch.nn.Embedding", model.get_input_embeddings())
    room = min(
        _MOST_TOKENS,
        chunk_logits(model.device) // embedding.weight.shape[0],
        max(_FEWEST_TOKENS, int(operations / (work * weights))),
    )
    order = np.argsort(np.asarray(examples.num_tokens), kind="stable")
    chosen = (order[-1], order[len(order) // 2], order[0])
    return [
        _cut(examples[int(index)], max(2, size))
        for index, size in zip(chosen[:count], (room // 2, room // 4, room // 4), strict=False)
    ]


def _cut(example: Example, num_tokens: int) -> Example:
    """Keep ``num_tokens`` up to the last one that is trained, or the first ones where that is among them."""
    end = int(np.flatnonzero(example.loss_mask)[-1]) + 1 if example.loss_mask.any() else num_tokens
    kept = slice(max(0, end - num_tokens), max(end, num_tokens))
    return replace(example, input_ids=example.input_ids[kept], loss_mask=example.loss_mask[kept])
