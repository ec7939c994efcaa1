"""What layers keep between the passes, counted, and that gradients do not depend on it."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from sftcli.config.schema.training import Checkpointing, TrainingSettings
from sftcli.data.batches.batch import collate
from sftcli.errors import UsageError
from sftcli.modeling.activations import checkpoint_activations, ways_down
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.kernels.rotary import forward_with
from sftcli.training.loss import response_nll_sum
from sftcli.training.out_of_memory import MemoryLadder
from sftcli.training.state import TrainState
from tests.support.tiny_model import tiny_config
from tests.support.training import CPU, PAD_ID, random_examples, tiny_llama

OFF, SELECTIVE, LAYERS, OFFLOAD = Checkpointing


def passed(model, how, *, count=6):
    """Take a pass of ``model``; return loss, gradients, the bytes kept for it on the device, and products computed."""
    batch = collate(random_examples(count, longest=40), example_ids=range(count), pad_id=PAD_ID)
    if how.is_on:
        checkpoint_activations(model, how)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with Counted() as counted:
        loss = response_nll_sum(model, batch)
        kept = counted.alive(but=weights)
        loss.backward()
    gradients = [weight.grad for weight in model.parameters()]
    return loss.detach(), gradients, kept, counted.products


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the products of a block, and the bytes of the tensors made in it that are still there."""

    def __init__(self):
        super().__init__()
        self.made, self.products = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.products += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        parts = result if isinstance(result, tuple | list) else (result,)
        for part in parts:
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                self.made.append((storage._weak_ref(), storage.data_ptr(), storage.nbytes()))
        return result

    def alive(self, *, but):
        there = {
            place: size
            for weak, place, size in self.made
            if place not in but and not torch.UntypedStorage._expired(weak)
        }
        return sum(there.values())


@pytest.mark.parametrize("how", [SELECTIVE, LAYERS, OFFLOAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_the_same_bit_for_bit(how, dtype):
    loss, gradients, *_ = passed(tiny_llama(dropout=0.0).to(dtype).train(), OFF)
    again, others, *_ = passed(tiny_llama(dropout=0.0).to(dtype).train(), how)
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("how", [SELECTIVE, LAYERS, OFFLOAD])
def test_dropout_is_the_same_in_what_is_computed_again(how):
    found = []
    for one in (OFF, how):
        model = tiny_llama(dropout=0.2).train()
        torch.manual_seed(1)
        found.append(passed(model, one)[:2])
    (loss, gradients), (again, others) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def test_each_way_keeps_less_and_selective_computes_fewer_products_again():
    kept, products = {}, {}
    for how in (OFF, SELECTIVE, LAYERS):
        config = tiny_config()
        config.intermediate_size = 3 * config.hidden_size  # as models have it; a narrower one is kept as well
        *_, kept[how], products[how] = passed(LlamaForCausalLM(config).train(), how)
    assert kept[OFF] > 1.3 * kept[SELECTIVE] > 1.3 * kept[LAYERS]
    assert products[OFF] < products[SELECTIVE] < products[LAYERS]
    layers = len(tiny_llama().model.layers)
    # Four projections of attention are not computed again; the block's last product is not needed by its backward pass.
    assert products[LAYERS] - products[OFF] == 6 * layers
    assert products[SELECTIVE] - products[OFF] == 2 * layers


def test_offload_sends_the_input_of_each_layer_to_the_host_and_nothing_else(monkeypatch):
    sent, back = [], []

    def to_host(tensor):
        sent.append(tuple(tensor.shape))
        return tensor.clone()

    def from_host(packed):
        back.append(tuple(packed.shape))
        return packed

    monkeypatch.setattr("sftcli.modeling.activations._to_host", to_host)
    monkeypatch.setattr("sftcli.modeling.activations._from_host", from_host)
    model = tiny_llama().train()
    _, gradients, *_ = passed(model, OFFLOAD)
    _, plain, *_ = passed(tiny_llama().train(), OFF)
    states = [shape for shape in sent if len(shape) == 3 and shape[-1] == model.config.hidden_size]
    assert len(states) == len(model.model.layers)
    assert len(back) >= len(states)
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain, strict=True))


def test_kernel_that_turns_in_place_spoils_no_product_that_is_kept():
    def turn_in_place(query, key, cos, sin):
        class InPlace(torch.autograd.Function):
            @staticmethod
            def forward(_, query, key):
                for part in (query, key):
                    part.data.copy_(turned(part.data))
                return query.view_as(query), key.view_as(key)

            @staticmethod
            def backward(_, of_query, of_key):
                return turned(of_query, -1), turned(of_key, -1)

        def turned(part, way=1):
            first, second = part.chunk(2, dim=-1)
            return part * cos[:, None] + way * torch.cat((-second, first), dim=-1) * sin[:, None]

        return InPlace.apply(query, key)

    found = []
    for how in (OFF, SELECTIVE):
        model = tiny_llama().train()
        for layer in model.model.layers:
            layer.self_attn.forward = forward_with(layer.self_attn, turn_in_place).__get__(layer.self_attn)
        found.append(passed(model, how)[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("how", [SELECTIVE, OFFLOAD])
def test_layers_that_are_fused_are_checkpointed_too(how):
    found = []
    for one in (OFF, how):
        model = tiny_llama().train()
        fuse_layers(model)
        found.append(passed(model, one)[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_ladder_goes_from_each_way_to_the_one_that_keeps_less():
    cuda, model = torch.device("cuda"), tiny_llama()
    assert ways_down(model, OFF, CPU) == [SELECTIVE, LAYERS]
    assert ways_down(model, OFF, cuda) == [SELECTIVE, LAYERS, OFFLOAD]
    assert ways_down(model, LAYERS, cuda) == [OFFLOAD]
    assert ways_down(model, LAYERS, CPU) == ways_down(model, OFFLOAD, cuda) == []
    given = []
    ladder = MemoryLadder(
        micro_batch_size=1, make_plan=str, ways=ways_down(model, OFF, cuda), checkpoint=given.append
    )
    state = TrainState()
    while (lower := ladder.below(state)) is not None:
        state = lower
        ladder.plan(state)
        ladder.plan(state)
    assert given == [SELECTIVE, LAYERS, OFFLOAD]
    assert ladder.way_down(state, ladder.plan(state)) == ""


def test_run_of_an_older_version_that_checkpoints_goes_on_so():
    given = []
    ladder = MemoryLadder(
        micro_batch_size=1, make_plan=str, ways=[SELECTIVE, LAYERS], checkpoint=given.append
    )
    state = replace(TrainState(), checkpoints_activations=True)
    ladder.plan(state)
    assert given == [LAYERS]
    assert ladder.below(state) is None


@pytest.mark.parametrize(
    ("value", "how"), [(True, LAYERS), (False, OFF), ("true", LAYERS), ("selective", SELECTIVE)]
)
def test_setting_takes_true_and_false_and_words(value, how):
    assert TrainingSettings(gradient_checkpointing=value).gradient_checkpointing is how


def test_model_that_cannot_is_refused():
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    assert ways_down(model, OFF, CPU) == []
    with pytest.raises(UsageError, match="does not support gradient checkpointing"):
        checkpoint_activations(model, SELECTIVE)
