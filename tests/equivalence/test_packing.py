"""Laws of packing: documents in one row are as good as apart, for loss and gradients, whatever the model's kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sftcli.config.schema.training import Loss
from sftcli.data.batches.batch import collate, collate_packed
from sftcli.modeling.kernels.document_attention import attend_as_before, attend_by_document
from sftcli.training.loss import minimized, response_nll_sum
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.training import PAD_ID, random_examples

EXAMPLES = random_examples(8)
IDS = range(8)
TOLERANCE = 1e-6  # relative, in float32
BY_DOCUMENT = [name for name in ARCHITECTURES if name != "modern"]


def one_row():
    return [collate_packed([EXAMPLES], example_ids=IDS, pad_id=PAD_ID)]


def several_rows():
    packs = [EXAMPLES[:3], EXAMPLES[3:5], EXAMPLES[5:]]
    return [collate_packed(packs, example_ids=IDS, pad_id=PAD_ID)]


def padded():
    return [collate(EXAMPLES, example_ids=IDS, pad_id=PAD_ID)]


def apart():
    return [collate([EXAMPLES[index]], example_ids=[index], pad_id=PAD_ID) for index in IDS]


def several_passes():
    """The global batch of eight as 5 + 2 + 1."""
    cuts = [(0, 5), (5, 7), (7, 8)]
    return [
        collate_packed([EXAMPLES[begin:end]], example_ids=range(begin, end), pad_id=PAD_ID)
        for begin, end in cuts
    ]


def two_passes():
    return [
        collate_packed([EXAMPLES[begin : begin + 4]], example_ids=range(begin, begin + 4), pad_id=PAD_ID)
        for begin in (0, 4)
    ]


def loss_and_gradient(model, batches, loss_kind=Loss.NLL):
    """Return the loss of the global batch and its gradient as one float64 vector."""
    model.train()
    model.zero_grad()
    count = sum(batch.response_tokens for batch in batches)
    loss = 0.0
    for batch in batches:
        total = minimized(response_nll_sum(model, batch, loss_kind))
        (total / count).backward()
        loss += total.item() / count
    gradient = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    return loss, gradient


def assert_equal(model, batches, expected, loss_kind=Loss.NLL):
    loss, gradient = loss_and_gradient(model, batches, loss_kind)
    assert loss == pytest.approx(expected[0], rel=TOLERANCE)
    assert (gradient - expected[1]).norm() <= TOLERANCE * expected[1].norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layout", [padded, one_row, several_rows, two_passes, several_passes])
def test_packed_equals_separate_equals_padded_by_mask(name, layout):
    model = build_architecture(name)
    assert_equal(model, layout(), loss_and_gradient(model, apart()))


@pytest.mark.parametrize("name", BY_DOCUMENT)
@pytest.mark.parametrize("layout", [padded, apart, one_row, several_rows, two_passes, several_passes])
def test_packed_equals_separate_equals_padded_by_document(name, layout):
    model = build_architecture(name)
    expected = loss_and_gradient(model, apart())
    assert attend_by_document(model)
    assert_equal(model, layout(), expected)


@pytest.mark.parametrize("layout", [padded, one_row, two_passes])
def test_packed_equals_separate_in_dynamic_fine_tuning(layout):
    model = build_architecture("llama")
    expected = loss_and_gradient(model, apart(), Loss.DFT)
    assert expected[0] < 0.5 * loss_and_gradient(model, apart())[0]
    assert attend_by_document(model)
    assert_equal(model, layout(), expected, Loss.DFT)


@pytest.mark.parametrize("name", BY_DOCUMENT)
def test_another_document_in_the_row_changes_no_bit_of_this_one(name):
    model = build_architecture(name).eval()
    assert attend_by_document(model)
    seen = []
    for token in (7, 8):
        other = replace(EXAMPLES[0], input_ids=np.full_like(EXAMPLES[0].input_ids, token))
        batch = collate_packed([[other, EXAMPLES[1]]], example_ids=[0, 1], pad_id=PAD_ID)
        with torch.no_grad():
            hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        seen.append(hidden[0, len(other.input_ids) :])
    assert torch.equal(*seen)


def test_attention_by_document_can_be_undone_and_is_no_part_of_the_model():
    model = build_architecture("llama")
    before = model.config.to_json_string()
    assert attend_by_document(model)
    assert model.config.to_json_string() == before
    attend_as_before(model)
    assert model.config._attn_implementation == "sdpa"
    assert_equal(model, several_rows(), loss_and_gradient(model, apart()))
