"""What a step asks of a CUDA device, counted without one, and the kernels of others beside what they stand for."""

import pytest
import torch

from benchmarks.gpu.count import Forms, count_step
from benchmarks.gpu.subjects import config_of

LAYERS = 1
# Of a layer, forward and backward: 7 products make 21 kernels, attention 2, norms 4, the gate 3, turns 2; the rest are sums and
# copies, and the float32 gradients of 9 weights.
MOST_IN_A_LAYER = {Forms.OWN: 140, Forms.TORCH: 100, Forms.LIGER: 75}
MOST_BESIDE_LAYERS = 110


def counts(forms, **changed):
    config = config_of("tiny")
    config.num_hidden_layers = changed.pop("layers", LAYERS)
    return count_step(config, tokens=256, documents=8, forms=forms, **changed)


@pytest.fixture(scope="module")
def by_forms():
    """Counts of a model of a layer and one of two, by whose kernels run."""
    return {forms: [counts(forms, layers=layers) for layers in (LAYERS, 2 * LAYERS)] for forms in Forms}


@pytest.mark.parametrize("forms", Forms)
def test_a_layer_and_the_rest_of_a_step_are_few_kernels(by_forms, forms):
    small, large = (found.total for found in by_forms[forms])
    layer = (large - small) / LAYERS
    assert layer <= MOST_IN_A_LAYER[forms]
    assert small - LAYERS * layer <= MOST_BESIDE_LAYERS


def test_kernels_of_others_halve_those_of_a_layer(by_forms):
    layer = {forms: found[1].total - found[0].total for forms, found in by_forms.items()}
    assert layer[Forms.LIGER] < 0.55 * layer[Forms.OWN]


def test_norms_gates_and_turns_are_one_kernel_forward_and_one_backward(by_forms):
    norms, gates, turns = 2 * LAYERS + 1, LAYERS, LAYERS
    assert by_forms[Forms.TORCH][0].kernels["one_kernel"] == 2 * norms
    # The product of a gate is made again in the backward pass.
    assert by_forms[Forms.LIGER][0].kernels["one_kernel"] == 2 * norms + 3 * gates + 2 * turns


def test_with_an_adapter_as_many_are_one_kernel():
    found = counts(Forms.LIGER, rank=4)
    norms, gates, turns = 2 * LAYERS + 1, LAYERS, LAYERS
    # Nothing before the first norm trains, so it has no backward pass.
    assert found.kernels["one_kernel"] == 2 * norms - 1 + 2 * gates + 2 * turns


def test_a_layer_with_an_adapter_takes_eight_kernels_a_product_and_sums_on_the_way():
    one, two = (counts(Forms.LIGER, rank=4, layers=layers).kernels for layers in (1, 2))
    layer = two - one
    assert layer["mm"] + layer["addmm"] + layer["addmm_"] == 7 * 8
    assert layer["mul"] == 0  # of scaling
    assert layer["add"] == 4 + 3  # residual sums, and gradients of inputs that products share
    assert layer.total() <= 75


def test_sums_over_chunks_of_the_head_make_nothing_else_of_its_size(monkeypatch):
    """One float32 gradient, which each chunk adds to in its place; bfloat16 of that size are the product's weight alone."""
    rows, config = 16, config_of("tiny")
    monkeypatch.setitem(chunks(), "cuda", rows * config.vocab_size)
    found = counts(Forms.LIGER)
    head = (config.vocab_size, config.hidden_size)
    chunk_count = 256 // 2 // rows
    assert found.kernels["addmm"] == chunk_count - 1
    # The sum itself as the result of each product, scaled once, and the float32 gradient of the embedding's master.
    written = found.largest[(head, torch.float32)]
    assert written <= chunk_count + 3


def chunks():
    from sftcli.training.loss import CHUNK_LOGITS

    return CHUNK_LOGITS
