"""What the host knows of positions is what a search of the tensors finds."""

import pytest
import torch

from sftcli.data.batches.batch import IGNORED, collate, collate_packed
from tests.support.training import PAD_ID, random_examples


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_row", [1, 2, 6])
def test_places_of_loss_and_of_tokens_are_those_that_a_search_finds(seed: int, per_row: int):
    examples = random_examples(6, seed=seed)
    packs = [examples[begin : begin + per_row] for begin in range(0, 6, per_row)]
    for batch in (
        collate_packed(packs, example_ids=range(6), pad_id=PAD_ID),
        collate(examples, example_ids=range(6), pad_id=PAD_ID),
    ):
        assert torch.equal(batch.loss_places, (batch.targets != IGNORED).flatten().nonzero()[:, 0])
        assert batch.response_tokens == len(batch.loss_places)
        assert batch.is_token.sum(1).tolist() == list(batch.fills)
        assert torch.equal(batch.token_places, batch.is_token.flatten().nonzero()[:, 0])
        meta = batch.to(torch.device("meta"))
        for tensor in (meta.loss_places, meta.is_token, meta.token_places):
            assert tensor.device.type == "meta"
