"""The load-balancing loss is that of transformers over all tokens of a step, however the step is cut and laid out."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from sftcli.config.schema.training import Loss
from sftcli.data.batches.batch import IGNORED, collate, collate_packed
from sftcli.errors import UsageError
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.training.experts.balance import BalancedLoss, require_balance
from sftcli.training.loss import minimized, plain_nll_sum, response_nll_sum, three_sums
from tests.support.tiny_experts import build_experts
from tests.support.training import PAD_ID, random_examples, tiny_llama

EXAMPLES = random_examples(6)
COEFFICIENT = 0.3
BALANCED = ("mixtral", "qwen3_moe", "gpt_oss")


def padded(*groups):
    return [collate([EXAMPLES[i] for i in group], example_ids=group, pad_id=PAD_ID) for group in groups]


def packed(*groups):
    return [
        collate_packed([[EXAMPLES[i] for i in group]], example_ids=group, pad_id=PAD_ID) for group in groups
    ]


LAYOUTS = {
    "one": partial(padded, range(6)),
    "several": partial(padded, range(4), [4], [5]),
    "packed": partial(packed, range(6)),
    "several packed": partial(packed, range(5), [5]),
}


def by_transformers(model):
    """Return loss, load-balancing loss and gradients of all rows as one padded batch, as the class computes them."""
    (batch,) = padded(range(6))
    mask = torch.zeros_like(batch.input_ids)
    for row, example in enumerate(EXAMPLES):
        mask[row, : len(example.input_ids)] = 1
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    model.train()
    outputs = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels, output_router_logits=True)
    assert outputs.aux_loss.item() > 0
    nll = outputs.loss - model.router_aux_loss_coef * outputs.aux_loss
    (nll + COEFFICIENT * outputs.aux_loss).backward()
    return nll.item(), outputs.aux_loss.item(), gradients(model)


def gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return found


def by_step(model, window, compute=response_nll_sum):
    model.train()
    loss = BalancedLoss(partial(compute, model), model, coefficient=COEFFICIENT)
    count = sum(batch.response_tokens for batch in window)
    loss.begin(window)
    total = torch.zeros(3)
    for batch in window:
        sums = loss(batch)
        (minimized(sums) / count).backward()
        total += three_sums(sums.detach())
    return total[1].item() / count, total[2].item(), gradients(model)


def assert_same(found, expected):
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        if gradient is not None:
            assert (found[2][name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, layout)
        for family in BALANCED
        for layout in LAYOUTS
        if family != "gpt_oss" or "packed" not in layout  # its attention keeps no documents of one row apart
    ],
)
def test_loss_and_gradients_are_those_of_transformers_over_the_whole_step(family: str, layout: str):
    model = build_experts(family)
    expected = by_transformers(model)
    if "packed" in layout:
        assert attend_by_document(model)
    assert_same(by_step(model, LAYOUTS[layout]()), expected)


def test_logits_of_whole_batches_give_the_same():
    model = build_experts("mixtral")
    expected = by_transformers(model)
    assert_same(by_step(model, LAYOUTS["several"](), plain_nll_sum), expected)


def test_it_goes_with_dynamic_fine_tuning():
    model, window = build_experts("mixtral"), LAYOUTS["several"]()
    plain = BalancedLoss(partial(response_nll_sum, model), model, coefficient=COEFFICIENT)
    loss = BalancedLoss(partial(response_nll_sum, model, loss=Loss.DFT), model, coefficient=COEFFICIENT)
    for each in (plain, loss):
        each.begin(window)
    nll, weighted = plain(window[0]).tolist(), loss(window[0]).tolist()
    assert weighted[1:] == pytest.approx(nll[1:])
    alone = minimized(response_nll_sum(model, window[0], Loss.DFT)).item()
    assert weighted[0] - alone == pytest.approx(nll[0] - nll[1], rel=1e-4)


@pytest.mark.parametrize("layout", ["one", "several"])
def test_layers_that_are_computed_again_in_the_backward_pass_count_once(layout: str):
    model = build_experts("mixtral")
    expected = by_transformers(model)
    checkpoint_activations(model)
    assert_same(by_step(model, LAYOUTS[layout]()), expected)


def test_an_adapter_is_trained_by_it_through_frozen_routers():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = inject_adapter_in_model(config, build_experts("mixtral"))
    expected = by_transformers(model)
    assert all("lora" in name for name in expected[2])
    assert_same(by_step(model, LAYOUTS["several"]()), expected)


def test_counting_the_choices_moves_no_random_number():
    model = build_experts("mixtral", attention_dropout=0.5)
    window = LAYOUTS["several"]()
    loss = BalancedLoss(partial(response_nll_sum, model), model, coefficient=COEFFICIENT)
    before = torch.get_rng_state()
    model.train()
    loss.begin(window)
    assert torch.equal(before, torch.get_rng_state())


def test_padding_routes_nowhere():
    model, window = build_experts("mixtral"), padded(range(6))
    assert window[0].padding_tokens
    before = by_step(model, window)[1]
    with torch.no_grad():
        model.get_input_embeddings().weight[PAD_ID].mul_(-3.0)
    assert by_step(model, window)[1] == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("family", BALANCED)
def test_families_that_compute_it_are_known(family: str):
    require_balance(build_experts(family), *padded(range(3)))


@pytest.mark.parametrize("build", [partial(build_experts, "deepseek_v3"), tiny_llama])
def test_families_that_do_not_are_refused_by_name(build):
    model = build()
    with pytest.raises(UsageError, match=f"{type(model).__name__} has no load-balancing loss"):
        require_balance(model, *padded(range(3)))


def test_a_class_that_computes_another_one_is_refused(monkeypatch):
    model = build_experts("mixtral")
    model.num_experts = 5  # what it multiplies with
    with pytest.raises(UsageError, match="no load-balancing loss that is known"):
        require_balance(model, *padded(range(3)))
