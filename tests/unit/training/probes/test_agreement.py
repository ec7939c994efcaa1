"""What makes training faster is used only where loss and gradients are those of the model itself."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaForCausalLM

from sftcli.modeling.kernels import fuse as fused
from sftcli.modeling.kernels import ways
from sftcli.modeling.kernels.fuse import fuse_layers, restore_layers
from sftcli.modeling.kernels.fused_layer import layer_forward
from sftcli.modeling.kernels.ways import Part, Way
from sftcli.training.loss import response_nll_sum
from sftcli.training.probes import agreement
from sftcli.training.probes.agreement import Ways, agreed_ways
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.rows import cut_rows
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.tiny_model import tiny_config
from tests.support.training import PAD_ID, random_examples, tiny_llama

EXAMPLES = random_examples(6, longest=60)
ALL = Ways(layers=True, rows=RowSharing.BOUNDS, head=True)
BY_DOCUMENT = [name for name in ARCHITECTURES if name != "modern"]


def agreed(model, fusion, *, wanted=ALL, **options):
    return agreed_ways(model, fusion, EXAMPLES[:3], wanted=wanted, pad_id=PAD_ID, **options)


def state_of(model):
    return (
        {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        torch.get_rng_state(),
        [weight.grad for weight in model.parameters()],
        model.training,
        model.config._attn_implementation,
        {name for name, module in model.named_modules() if "forward" in vars(module)},
    )


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", BY_DOCUMENT)
def test_every_way_agrees_and_nothing_is_left_behind(name: str, with_gradients: bool):
    model = build_architecture(name)
    fusion = fuse_layers(model)
    before = state_of(model)
    assert agreed(model, fusion, with_gradients=with_gradients) == ALL
    after = state_of(model)
    assert all(torch.equal(tensor, after[0][key]) for key, tensor in before[0].items())
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert all(gradient is None for gradient in after[2])


def test_an_adapter_agrees_too_with_its_dropout_switched_off():
    config = LoraConfig(
        r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    model = inject_adapter_in_model(config, tiny_llama())
    assert agreed(model, None, wanted=Ways(layers=False, rows=RowSharing.BOUNDS, head=True)).count == 2


def slow_fault(self, hidden_states, **rest):
    made = layer_forward(self, hidden_states, **rest)
    return made * 1.001 if rest.get("cu_seq_lens_q") is not None else made


def test_layers_that_are_off_by_a_thousandth_run_as_they_are(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(fused, "_are_close", lambda plain, fused: True)  # what tries them sees nothing
    fusion = fuse_layers(model)
    first = fusion.parts[[module for module, _ in fusion.parts].index(model.model.layers[0])]
    first[0].forward = partial(slow_fault, first[0])
    parts = [(module, slow_fault if module is first[0] else forward) for module, forward in fusion.parts]
    faulty = fused.Fusion(fused=fusion.fused, left_alone=(), parts=parts)
    assert agreed(model, faulty) == Ways(layers=False, rows=RowSharing.BOUNDS, head=True)


def test_a_leak_of_a_thousandth_keeps_rows_apart():
    model = tiny_llama()

    def leak(module, inputs, output):
        return output + 1e-3 * output.cumsum(1).roll(1, 1) / output.shape[1] * (output.shape[1] > 100)

    assert agreed(model, None, wanted=Ways(layers=False, rows=RowSharing.BOUNDS, head=True)).count == 2
    model.model.layers[0].register_forward_hook(leak)  # in rows that only packing makes so long
    assert sum(EXAMPLES.num_tokens[:3]) > 100 > max(EXAMPLES.num_tokens[:3])
    assert (
        agreed(model, None, wanted=Ways(layers=False, rows=RowSharing.BOUNDS, head=True)).rows
        == RowSharing.NONE
    )


LAYERS = 30


def deep_llama():
    config = tiny_config()
    config.num_hidden_layers = LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("place", [0, LAYERS // 2, LAYERS - 1])
def test_one_of_many_layers_that_turns_positions_it_should_not_is_seen(monkeypatch, place: int):
    model = deep_llama()
    faulty = model.model.layers[place]

    def turned_further(self, hidden_states, *, position_embeddings, **rest):
        if self is faulty and rest.get("cu_seq_lens_q") is not None:
            position_embeddings = tuple(part.roll(1, dims=1) for part in position_embeddings)
        return layer_forward(self, hidden_states, position_embeddings=position_embeddings, **rest)

    monkeypatch.setitem(ways.WAYS, "cpu", ways.WAYS["cpu"] | {Part.LAYER: (Way(forward=turned_further),)})
    assert fuse_layers(model).left_alone == (f"LlamaDecoderLayer (1 of {LAYERS})",)
    restore_layers(model)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_are_close", lambda plain, fused: True)  # what tries them sees nothing
        fusion = fuse_layers(model)
    assert not agreed(model, fusion).layers


@pytest.mark.parametrize("place", [0, LAYERS // 2, LAYERS - 1])
def test_a_leak_of_a_thousandth_in_the_attention_of_one_of_many_layers_is_seen(place: int):
    wanted = Ways(layers=False, rows=RowSharing.BOUNDS, head=True)
    model = deep_llama()
    assert agreed(model, None, wanted=wanted).rows is RowSharing.BOUNDS

    def leak(module, inputs, output):
        made = output[0]
        counts = torch.arange(1, made.shape[1] + 1)[:, None]
        is_together = made.shape[1] > max(EXAMPLES.num_tokens)
        return made + 1e-3 * is_together * made.cumsum(1) / counts, *output[1:]

    model.model.layers[place].self_attn.register_forward_hook(leak)
    assert agreed(model, None, wanted=wanted).rows is RowSharing.NONE


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_head_whose_loss_is_another_one_is_not_used(monkeypatch, factor: float):
    monkeypatch.setattr(agreement, "response_nll_sum", lambda *args: response_nll_sum(*args) * factor)
    model = tiny_llama()
    assert agreed(model, fuse_layers(model)) == Ways(layers=True, rows=RowSharing.BOUNDS, head=False)


def test_the_model_itself_is_run_once_for_all_ways_that_are_tried(monkeypatch):
    monkeypatch.setattr(agreement, "response_nll_sum", lambda *args: response_nll_sum(*args) * 1.001)
    model, passes = tiny_llama(), []
    fusion = fuse_layers(model)
    model.model.register_forward_hook(lambda *_: passes.append(1))
    assert agreed(model, fusion).count == 2
    assert len(passes) == 3 + 3  # three rows by themselves, and three ways until the head is left out


def test_gradients_count_where_the_loss_is_right(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.001

    monkeypatch.setattr(agreement, "response_nll_sum", lambda *args: Wrong.apply(response_nll_sum(*args)))
    model = tiny_llama()
    assert not agreed(model, fuse_layers(model)).head
    assert agreed(model, fuse_layers(model), with_gradients=False).head


def test_rows_are_cut_to_what_a_large_model_can_try_and_keep_their_trained_end():
    model, long, one = tiny_llama(), random_examples(9, longest=400), random_examples(1)
    whole = cut_rows(model, long, work=1)
    assert len(whole[0].input_ids) == min(300, max(long.num_tokens))
    few = cut_rows(model, long, work=10**9)
    assert [len(row.input_ids) for row in few] == [24, 12, min(12, min(long.num_tokens))]
    assert all(row.loss_mask[-1] for row in few)
    assert len(cut_rows(model, one, work=1, count=2)) == 2
