"""Layers, norms and feed-forward blocks as few operations compute what the modules of transformers compute."""

from copy import deepcopy

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from sftcli.data.batches.batch import collate_packed
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.kernels import ways
from sftcli.modeling.kernels.document_attention import attend_as_before, attend_by_document
from sftcli.modeling.kernels.fuse import Fusion, fuse_layers, restore_layers
from sftcli.modeling.kernels.fused_layer import layer_forward
from sftcli.training.loss import plain_nll_sum
from tests.support.training import random_examples, tiny_llama

SMALL = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for name, weight in model.named_parameters():  # gains away from 1, so that a lost one shows
            if "norm" in name:
                weight.data += 0.3 * torch.randn(weight.shape)
        return model


MODELS = {
    "llama": tiny_llama,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),  # gains are 1 + weight; GELU
}


def loss_and_gradients(model):
    ids = torch.randint(3, 500, (3, 11), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_unchanged_model(name: str):
    model = seeded(MODELS[name])
    fused = deepcopy(model)
    fuse_layers(fused)
    (loss, gradients), (fused_loss, fused_gradients) = loss_and_gradients(model), loss_and_gradients(fused)
    assert fused_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[parameter], gradient, atol=1e-6, rtol=1e-4, msg=parameter)


def packed_loss_and_gradients(model):
    batch = collate_packed([random_examples(5)], example_ids=range(5), pad_id=2)
    assert attend_by_document(model)
    loss = plain_nll_sum(model, batch)
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters()}


def operations(loss) -> set[str]:
    """Return the names of what the backward pass from ``loss`` runs."""
    found, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [after for after, _ in node.next_functions]
    return {node.name() for node in found}


BLOCKS = {"AttentionBlockBackward", "FeedForwardBlockBackward"}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_layers_of_packed_rows_are_two_operations_and_give_the_same(name: str):
    model = seeded(MODELS[name])
    for parameter, weight in model.named_parameters():  # those of Qwen2 begin at zero
        if parameter.endswith("bias"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(2))
    fused = deepcopy(model)
    fuse_layers(fused)
    (loss, gradients), (fused_loss, fused_gradients) = map(packed_loss_and_gradients, (model, fused))
    assert operations(fused_loss) >= BLOCKS
    assert not operations(loss) & BLOCKS
    assert fused_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in gradients.items():
        difference = (fused_gradients[parameter] - gradient).norm() / gradient.norm()
        assert difference < 2e-5, parameter


def test_layers_of_packed_rows_return_no_view_since_sharding_warns_of_one():
    model = tiny_llama()
    fuse_layers(model)
    made = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: made.append(output))
    loss, _ = packed_loss_and_gradients(model)
    assert operations(loss) >= BLOCKS
    assert [output._is_view() for output in made] == [False] * len(model.model.layers)


def test_layers_of_packed_rows_in_bfloat16_round_no_more_than_those_of_transformers():
    model = seeded(tiny_llama)
    fused = deepcopy(model)
    fuse_layers(fused)
    exact, plain, faster = (
        packed_loss_and_gradients(one)[1] for one in (deepcopy(model), model.bfloat16(), fused.bfloat16())
    )
    for parameter, gradient in exact.items():
        errors = [(one[parameter].float() - gradient).norm() for one in (plain, faster)]
        assert errors[1] < 1.3 * errors[0], parameter


@pytest.mark.parametrize("part", ["self_attn", "self_attn.v_proj", "post_attention_layernorm"])
def test_a_layer_with_a_hook_inside_runs_as_it_is(part: str):
    model = tiny_llama()
    fuse_layers(model)
    seen = []
    for layer in model.model.layers:
        layer.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(part))
    assert not operations(packed_loss_and_gradients(model)[0]) & BLOCKS
    assert len(seen) == len(model.model.layers)


def test_gradient_checkpointing_keeps_less_of_fused_layers_and_changes_no_gradient():
    def kept_and_gradients(is_on: bool):
        model, kept = tiny_llama().train(), {}
        fuse_layers(model)
        if is_on:
            checkpoint_activations(model)

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, gradients = packed_loss_and_gradients(model)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), gradients

    (kept, gradients), (kept_with, gradients_with) = map(kept_and_gradients, (False, True))
    assert kept_with < 0.8 * kept
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradients_with[parameter], gradient, atol=1e-6, rtol=1e-4)


def test_frozen_weights_of_a_layer_get_no_gradient():
    model = tiny_llama()
    fuse_layers(model)
    layer = model.model.layers[0]
    frozen = (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj, layer.input_layernorm)
    for part in frozen:
        part.weight.requires_grad_(False)
    loss, gradients = packed_loss_and_gradients(model)
    assert operations(loss) >= BLOCKS
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert len(without) == len(frozen)


def test_a_layer_that_turns_positions_another_way_is_left_alone(monkeypatch):
    def interleaved(part):
        return torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.rotate_half", interleaved)
    assert fuse_layers(tiny_llama()).left_alone == ("LlamaDecoderLayer",)


WINDOW = 8  # shorter than most rows of ``random_examples``
EVERY_OTHER = {"no_rope_layers": [1, 0], "layer_types": None}
ODD = {
    "layers without positions": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SMALL, **EVERY_OTHER)),
    "a window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=WINDOW)),
    "dropout of sums": lambda: SeedOssForCausalLM(
        SeedOssConfig(**SMALL, head_dim=8, residual_dropout=0.5, attention_dropout=0.0)
    ),
    "dropout of attention": lambda: tiny_llama(dropout=0.5),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_layers_in_training_give_what_their_class_gives(name: str):
    results = []
    for is_fused in (False, True):
        model = seeded(ODD[name]).train()
        if is_fused:
            fuse_layers(model)
        torch.manual_seed(0)  # dropout, where there is any
        results.append(packed_loss_and_gradients(model))
    (loss, gradients), (fused_loss, fused_gradients) = results
    assert fused_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in gradients.items():
        assert (fused_gradients[parameter] - gradient).norm() <= 2e-5 * gradient.norm(), parameter


def test_each_layer_is_judged_by_itself():
    fusion = fuse_layers(seeded(ODD["layers without positions"]))
    assert fusion.fused == ("SmolLM3DecoderLayer (1 of 2)", "SmolLM3MLP", "SmolLM3RMSNorm")
    assert fusion.left_alone == ("SmolLM3DecoderLayer (1 of 2)",)


def test_dropout_in_a_later_layer_leaves_that_layer_alone():
    model = seeded(tiny_llama)
    model.model.layers[1].self_attn.attention_dropout = 0.5
    fusion = fuse_layers(model)
    assert fusion.left_alone == ("LlamaDecoderLayer (1 of 2)",)
    assert [module for module, _ in fusion.parts if module in set(model.model.layers)] == [
        model.model.layers[0]
    ]
    model.train()
    torch.manual_seed(0)
    first = packed_loss_and_gradients(model)[0].item()
    attend_as_before(model)
    assert first != packed_loss_and_gradients(model)[0].item()  # it is drawn anew


def test_a_fault_of_a_thousandth_in_one_layer_is_seen(monkeypatch):
    model = seeded(tiny_llama)
    faulty = model.model.layers[1]

    def slightly_off(self, hidden_states, **rest):
        made = layer_forward(self, hidden_states, **rest)
        return made * 1.001 if self is faulty else made

    faulty_way = {ways.Part.LAYER: (ways.Way(forward=slightly_off),)}
    monkeypatch.setitem(ways.WAYS, "cpu", ways.WAYS["cpu"] | faulty_way)
    assert fuse_layers(model).left_alone == ("LlamaDecoderLayer (1 of 2)",)


@pytest.mark.parametrize(("longest", "is_fused"), [(WINDOW, True), (WINDOW + 1, False)])
def test_a_layer_with_a_window_is_two_operations_where_documents_are_no_longer(longest: int, is_fused: bool):
    model = seeded(ODD["a window"])
    fuse_layers(model)
    examples = random_examples(8, longest=longest + 1)
    assert max(examples.num_tokens) == longest
    batch = collate_packed([examples], example_ids=range(8), pad_id=2)
    assert attend_by_document(model)
    assert (operations(plain_nll_sum(model, batch)) >= BLOCKS) is is_fused


@pytest.mark.parametrize("name", ["dropout of sums", "dropout of attention"])
def test_a_layer_with_dropout_is_left_alone(name: str):
    model = seeded(ODD[name])
    before = torch.get_rng_state()
    assert any(kind.endswith("DecoderLayer") for kind in fuse_layers(model).left_alone)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_faster_can_be_suspended():
    model = tiny_llama()
    fusion = fuse_layers(model)
    with fusion.suspended():
        assert all("forward" not in vars(module) for module in model.modules())
    assert any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_weighs_its_sums_is_left_alone():
    shape = {"residual_multiplier": 0.5, "embedding_multiplier": 1.0, "attention_multiplier": 0.3}
    model = seeded(lambda: GraniteForCausalLM(GraniteConfig(**SMALL, **shape)))
    assert fuse_layers(model).left_alone == ("GraniteDecoderLayer",)


def test_loss_in_bfloat16_is_bit_for_bit_that_of_the_unchanged_model():
    model = seeded(tiny_llama)
    fused = deepcopy(model)
    fuse_layers(fused)
    assert torch.equal(loss_and_gradients(model.bfloat16())[0], loss_and_gradients(fused.bfloat16())[0])


def test_every_kind_is_found_in_a_llama():
    fusion = fuse_layers(tiny_llama())
    assert fusion == Fusion(fused=("LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm"), left_alone=())


def test_norm_with_another_formula_is_left_alone_and_named():
    fusion = fuse_layers(seeded(MODELS["gemma3"]))
    assert fusion == Fusion(fused=("Gemma3MLP",), left_alone=("Gemma3RMSNorm",))


def test_less_is_kept_for_the_backward_pass():
    def kept_bytes(model) -> int:
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(3, 500, (3, 64), generator=torch.Generator().manual_seed(1))
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.model(input_ids=ids).last_hidden_state.sum()
        size = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)
        del loss
        return size

    plain, fused = tiny_llama().bfloat16(), tiny_llama()
    fuse_layers(fused)
    assert kept_bytes(fused.bfloat16()) < 0.75 * kept_bytes(plain)


def test_part_with_a_hook_runs_as_it_is():
    model = tiny_llama()
    fuse_layers(model)
    seen = []
    part = model.model.layers[0].mlp.up_proj
    part.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    loss_and_gradients(model)
    assert seen == [(3, 11, 64)]


def test_part_with_an_adapter_around_it_is_not_passed_by():
    class Doubled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    losses = []
    for fuse in (False, True):
        model = tiny_llama()
        if fuse:
            fuse_layers(model)
        model.model.layers[0].mlp.down_proj = Doubled(model.model.layers[0].mlp.down_proj)
        losses.append(loss_and_gradients(model)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_frozen_weights_get_no_gradient():
    model = tiny_llama()
    fuse_layers(model)
    layer = model.model.layers[0]
    for weight in (layer.mlp.gate_proj.weight, layer.input_layernorm.weight):
        weight.requires_grad_(False)
    _, gradients = loss_and_gradients(model)
    assert gradients["model.layers.0.mlp.gate_proj.weight"] is None
    assert gradients["model.layers.0.input_layernorm.weight"] is None
    assert gradients["model.layers.0.mlp.up_proj.weight"] is not None


def test_restored_layers_run_what_their_class_runs():
    model = tiny_llama()
    fuse_layers(model)
    restore_layers(model)
    assert all("forward" not in vars(module) for module in model.modules())
