"""Gradients that are collected behind a pass are those that are collected as they are made."""

import pytest
import torch

from sftcli.data.batches.batch import collate
from sftcli.modeling.activations import checkpoint_activations
from sftcli.training.loss import response_nll_sum
from sftcli.training.weights.masters import MasterWeights
from tests.support.training import PAD_ID, random_examples, tiny_llama


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("is_checkpointing", [True, False])
def test_gradients_collected_behind_a_pass_are_the_same_bit_for_bit(tie: bool, is_checkpointing: bool):
    ends = []
    for at_once in (True, False):
        model = tiny_llama(tie=tie)
        weights = MasterWeights(model, compute_dtype=torch.bfloat16, collects_at_once=at_once)
        if is_checkpointing:
            checkpoint_activations(model)
        for seed in range(3):
            batch = collate(random_examples(4, seed=seed), example_ids=range(4), pad_id=PAD_ID)
            response_nll_sum(model, batch).backward()
            weights.collect()
            assert all(copy.grad is None for copy in model.parameters())
        ends.append({name: master.grad for name, master in weights.masters.items()})
    at_once, behind = ends
    assert all(gradient.dtype == torch.float32 for gradient in behind.values())
    assert all(torch.equal(gradient, behind[name]) for name, gradient in at_once.items())
