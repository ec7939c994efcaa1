"""Positions whose documents are told are not searched for documents, and others are as before."""

import torch
from transformers import masking_utils

from sftcli.modeling.kernels.told_positions import spare_search, spare_search_of_own_positions
from tests.support.training import tiny_llama


def test_positions_that_are_told_are_not_searched_and_equal_ones_are():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    other = positions.clone()
    spare_search(positions)
    spare_search(None)
    assert masking_utils.find_packed_sequence_indices(positions) is None
    assert masking_utils.find_packed_sequence_indices(other).tolist() == [[0, 0, 0, 1, 1]]
    assert masking_utils.find_packed_sequence_indices(torch.arange(4)[None]) is None


def test_a_pass_with_positions_is_searched_and_one_without_is_not(monkeypatch):
    spare_search(None)
    model, found = tiny_llama(), []
    spare_search_of_own_positions(model)
    looked = masking_utils.find_packed_sequence_indices
    # In the place of the device that is waited for: what a mask is told of the positions.
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: found.append(looked(ids)) or found[-1]
    )
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    model.model(input_ids=ids, position_ids=positions, use_cache=False)
    model.model(input_ids=ids, use_cache=False)
    assert found[0].tolist() == [[0, 0, 1, 1]]
    assert found[1] is None
    assert looked(positions).tolist() == [[0, 0, 1, 1]]  # nothing is left behind a pass
