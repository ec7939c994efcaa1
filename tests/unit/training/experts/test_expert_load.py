"""The load of experts is counted as it is: token by token, without padding, and only where there are experts."""

import math

import pytest
import torch

from sftcli.data.batches.batch import batches_in_order_of_length
from sftcli.events import ExpertLoad, NeverStop
from sftcli.training.distributed.group import Group
from sftcli.training.experts.expert_load import ExpertMeter, load_of
from sftcli.training.loss import heldout_nll, response_nll_sum
from tests.support.tiny_experts import FAMILIES, build_experts
from tests.support.training import PAD_ID, random_examples, tiny_llama

EXAMPLES = random_examples(7)
ROUTERS = ("gate", "router")


def by_hand(model) -> dict[str, list[int]]:
    """Return how often each expert is chosen, from the numbers that routers return, one row at a time."""
    counts: dict[str, list[int]] = {}

    def count(name):
        def hook(module, args, output):
            sizes = counts.setdefault(name, [0] * (module.weight.shape[0]))
            indices = next(part for part in output if not part.is_floating_point())
            for number in indices.flatten().tolist():
                sizes[number] += 1

        return hook

    handles = [
        module.register_forward_hook(count(name.rpartition(".")[0] + ".experts"))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ROUTERS
    ]
    with torch.no_grad():
        for example in EXAMPLES:
            model(input_ids=torch.from_numpy(example.input_ids)[None].long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


def metered(model, max_batch_tokens: int = 60) -> ExpertMeter:
    batches = batches_in_order_of_length(
        EXAMPLES, rows=range(len(EXAMPLES)), max_batch_tokens=max_batch_tokens, pad_id=PAD_ID
    )
    meter = ExpertMeter(model)
    with meter.listening() as count:
        heldout_nll(lambda batch: response_nll_sum(model, batch), batches, stop=NeverStop(), after_own=count)
    return meter


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_hand_count(family: str):
    model = build_experts(family).eval()
    expected = by_hand(model)
    assert expected
    found = {name: counts.tolist() for name, counts in metered(model).counts.items()}
    assert found == expected
    chosen = 2 * sum(EXAMPLES.num_tokens)
    assert all(sum(counts) == chosen for counts in found.values())
    loads = {name.split(".")[2]: load_of(counts) for name, counts in expected.items()}
    assert metered(model).load(Group()) == loads


def test_a_model_without_experts_is_left_alone():
    model = tiny_llama()
    with ExpertMeter(model).listening() as count:
        assert count is None
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert metered(model).load(Group()) == {}


def test_nothing_listens_behind_the_measurement():
    model = build_experts("mixtral").eval()
    metered(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_load_says_how_even_it_is():
    assert load_of([5, 5, 5, 5]) == ExpertLoad(busiest=0.25, unused=0.0, entropy=pytest.approx(1.0))
    assert load_of([8, 0, 0, 0]) == ExpertLoad(busiest=1.0, unused=0.75, entropy=0.0)
    half = load_of([2, 2, 0, 0])
    assert half.entropy == pytest.approx(math.log(2) / math.log(4))


def test_the_least_even_layer_speaks_for_all():
    even, odd = load_of([1, 1]), load_of([3, 1])
    layers = {"0": vars_of(even), "1": vars_of(odd)}
    assert ExpertLoad.worst(layers) == odd
    assert ExpertLoad.worst({}) is None
    assert ExpertLoad.worst({"0": {}, "1": 3}) is None
    assert str(odd) == "busiest 75%, unused 0%, entropy 0.81"


def vars_of(load: ExpertLoad) -> dict[str, float]:
    return {"busiest": load.busiest, "unused": load.unused, "entropy": load.entropy}
