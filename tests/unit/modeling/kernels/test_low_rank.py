"""Linear layers with an adapter in few kernels give the losses and gradients of peft's own form."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from sftcli.config.schema.adapter import AdapterSettings
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.adapter.adapter import add_adapter
from sftcli.modeling.kernels import ways
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.kernels.low_rank import LowRank, low_rank_forward
from sftcli.modeling.kernels.ways import Part
from tests.support.training import tiny_llama

SMALL = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
KINDS = {"llama": tiny_llama, "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL))}  # Qwen2 has biases


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    monkeypatch.setitem(ways.WAYS, "cpu", {Part.LOW_RANK: ways.WAYS["cuda"][Part.LOW_RANK]})
    monkeypatch.setattr(ways, "WITH_ADAPTER", frozenset({"cpu"}))


def adapted(of="llama", **changed):
    """A model whose adapter has been trained, as its second matrices are not zero."""
    torch.manual_seed(0)
    model = KINDS[of]()
    add_adapter(model, AdapterSettings.model_validate({"kind": "lora", "rank": 4, "alpha": 12} | changed))
    for name, weight in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            nn.init.normal_(weight, std=0.2)
    return model


def loss_and_gradients(model):
    ids = torch.randint(3, 500, (3, 11), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return loss.detach(), found, loss


def off(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def nodes(loss):
    found, left = [], [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.append(node)
            left += [after for after, _ in node.next_functions]
    return [node.name() for node in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [{}, {"rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_losses_and_gradients_are_those_of_peft(kind, changed):
    model = adapted(kind, **changed)
    fused = deepcopy(model)
    fusion = fuse_layers(fused, has_adapter=True)
    assert (fusion.fused, fusion.left_alone) == (("Linear",), ())
    (loss, gradients, plain), (found, found_gradients, graph) = map(loss_and_gradients, (model, fused))
    layers = sum(name.endswith("lora_A") for name, _ in model.named_modules())
    assert nodes(graph).count("LowRankBackward") == layers
    assert "LowRankBackward" not in nodes(plain)
    assert off(found, loss) < 1e-6
    assert gradients.keys() == found_gradients.keys()
    assert max(off(found_gradients[name], gradient) for name, gradient in gradients.items()) < 2e-5


def test_gradients_are_the_slopes_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, weight, bias, down, up = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    for part in (x, down, up):
        part.requires_grad_()
    made = LowRank.apply(x, weight, bias, down, up, 1.5)
    torch.testing.assert_close(made, x @ weight.t() + bias + 1.5 * (x @ down.t() @ up.t()))
    assert torch.autograd.gradcheck(
        lambda *parts: LowRank.apply(parts[0], weight, bias, *parts[1:], 1.5), (x, down, up)
    )


def test_in_bfloat16_it_rounds_no_more_than_peft():
    layer = adapted().model.layers[0].mlp.down_proj
    x, back = (torch.randn(40, 32 * width, generator=torch.Generator().manual_seed(2)) for width in (2, 1))

    def made(layer, forward):
        inputs = x.to(layer.base_layer.weight.dtype, copy=True).requires_grad_()
        wanted = [inputs, *(weight for weight in layer.parameters() if weight.requires_grad)]
        output = forward(layer, inputs)
        return [output.detach(), *torch.autograd.grad(output, wanted, back.to(output))]

    plain, faster, exact = (
        type(layer).forward,
        low_rank_forward,
        made(deepcopy(layer).double(), type(layer).forward),
    )
    ours, theirs = (made(deepcopy(layer).bfloat16(), forward) for forward in (faster, plain))
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert off(one, right) < 1.1 * off(other, right) < 0.02


def test_checkpointing_changes_no_gradient():
    model = adapted().train()
    fuse_layers(model, has_adapter=True)
    checkpointed = deepcopy(model)
    fuse_layers(checkpointed, has_adapter=True)
    checkpoint_activations(checkpointed)
    (loss, gradients, _), (found, found_gradients, _) = map(loss_and_gradients, (model, checkpointed))
    assert torch.equal(found, loss)
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("changed", [{"dropout": 0.1}, {"kind": "dora"}])
def test_what_is_more_than_two_matrices_runs_as_it_is(changed):
    model = adapted(**changed)
    fusion = fuse_layers(model, has_adapter=True)
    assert (fusion.fused, fusion.left_alone) == ((), ())
    assert "LowRankBackward" not in nodes(loss_and_gradients(model)[2])


def test_layers_that_are_switched_off_merged_or_have_a_hook_do_what_peft_does():
    model = adapted()
    fuse_layers(model, has_adapter=True)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 64)
    plain = layer(x)
    assert plain.grad_fn.name() == "LowRankBackward"
    seen = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(layer(x), plain)
    handle.remove()
    assert seen
    layer.enable_adapters(enabled=False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(enabled=True)
    layer.merge()
    torch.testing.assert_close(layer(x), plain)


def test_another_formula_is_left_alone_and_named(monkeypatch):
    model = adapted()
    kind = type(model.model.layers[0].mlp.down_proj)
    monkeypatch.setattr(
        kind, "forward", lambda self, x: self.base_layer(x) + self.lora_B.default(self.lora_A.default(x))
    )
    fusion = fuse_layers(model, has_adapter=True)
    assert (fusion.fused, fusion.left_alone) == ((), ("Linear",))
