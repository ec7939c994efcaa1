"""Parts of rows: together they are the rows."""

from itertools import product

import numpy as np
import pytest
import torch

from sftcli.data.batches.batch import IGNORED, Batch, collate, collate_packed
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin

PAD_ID = 2


def example(tokens: int) -> Example:
    mask = np.arange(tokens) % 3 == 1
    ids = np.arange(10, 10 + tokens).astype(np.int32)
    return Example(input_ids=ids, loss_mask=mask, origin=Origin(path="rows", line=1))


def batches() -> list[Batch]:
    rows = [example(tokens) for tokens in (11, 2, 5)]
    return [
        collate(rows, example_ids=range(3), pad_id=PAD_ID),
        collate_packed([rows], example_ids=range(3), pad_id=PAD_ID),
    ]


@pytest.mark.parametrize(("batch", "count"), list(product(batches(), (2, 3, 4, 13))))
def test_parts_are_the_rows_once_and_equally_wide(batch: Batch, count: int) -> None:
    parts = [batch.part(index, count) for index in range(count)]
    width = batch.input_ids.shape[1]
    assert len({part.input_ids.shape for part in parts}) == 1
    for name in ("input_ids", "targets"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined[:, :width], getattr(batch, name))
        assert name == "input_ids" or bool((joined[:, width:] == IGNORED).all())
    assert sum(part.tokens for part in parts) == batch.tokens
    assert torch.equal(torch.cat([part.is_token for part in parts], dim=1)[:, :width], batch.is_token)
    assert sum(part.response_tokens for part in parts) == batch.response_tokens
    for part in parts:
        assert bool((part.targets.flatten()[part.loss_places] != IGNORED).all())
        assert part.inputs["row_parts"] == count
        assert not part.has_halves


@pytest.mark.parametrize("count", [2, 5])
def test_positions_and_documents_are_those_of_the_whole_row(count: int) -> None:
    alone, packed = batches()
    for batch, row in ((alone, [*range(11)]), (packed, [*range(11), *range(2), *range(5)])):
        parts = [batch.part(index, count) for index in range(count)]
        positions = torch.cat([part.inputs["position_ids"][0] for part in parts]).tolist()
        assert positions == row + [0] * (len(positions) - len(row))
    padding = len(positions) - len(row)
    for part in parts:
        assert part.inputs["document_lengths"] == (11, 2, 5) + (1,) * padding
        assert part.inputs["cu_seq_lens_q"].tolist() == [0, 11, 13, *range(18, 19 + padding)]
        assert part.inputs["cu_seq_lens_q"].dtype == torch.int32


def test_a_row_of_one_process_is_whole() -> None:
    batch, _ = batches()
    assert batch.part(0, 1) is batch
    assert "row_parts" not in batch.inputs
