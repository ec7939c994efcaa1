"""Patterns of names, and what becomes of the weights that they mean."""

import pytest

from sftcli.errors import UsageError
from sftcli.training.embeddings import freeze_embeddings
from sftcli.training.selection import matches, select_weights
from tests.support.training import tiny_llama

UP = "model.layers.3.mlp.up_proj.weight"
MEANT = {
    "mlp", "layers.3", "layers.3.mlp", "layers.0-3", "layers.3-", "layers.2-7.mlp", "*.mlp.*", "*_proj", "up_????", "model",
    "weight", UP,
}  # fmt: skip
OTHERS = {
    "ml", "mlp.weight", "layers.4-", "layers.0-2", "layers.13", "3-.up_proj", "model.*.weight", "layers", "layers..mlp", ".mlp", "",
    "mlp.up_proj.weight.more",
} - {"layers"}  # fmt: skip


@pytest.mark.parametrize("pattern", sorted(MEANT | OTHERS))
def test_pattern_means_the_names_that_hold_its_words_one_after_the_other(pattern):
    assert matches(pattern, UP) is (pattern in MEANT)


def trained(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_train_restricts_and_freeze_takes_out():
    model = tiny_llama(tie=False)
    made = select_weights(model, train=["layers.1", "lm_head"], freeze=["*_layernorm", "self_attn"])
    assert trained(model) == {
        "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    }  # fmt: skip
    assert (made.trained, made.tensors, made.tied) == (4, 21, ())
    numbers = sum(weight.numel() for weight in model.parameters())
    assert made.share == pytest.approx(100 * (3 * 32 * 64 + 514 * 32) / numbers)
    assert made.in_words() == f"trains 4 of 21 tensors, {made.share:.3g} % of the weights"


def test_freeze_alone_trains_all_others():
    model = tiny_llama()
    every = trained(model)
    select_weights(model, freeze=["layers.0-"])
    assert trained(model) == {"model.embed_tokens.weight", "model.norm.weight"} < every


@pytest.mark.parametrize("settings", [{"train": ["embed_tokens"]}, {"train": ["lm_head"]}])
def test_tied_names_are_one_tensor_which_is_told(settings):
    model = tiny_llama(tie=True)
    made = select_weights(model, **settings)
    assert trained(model) == {"model.embed_tokens.weight"}
    assert made.in_words().endswith("; model.embed_tokens.weight and lm_head.weight are one tensor")
    both = tiny_llama(tie=True)
    assert select_weights(both, freeze=["embed_tokens", "layers.0"]).tied
    assert "model.embed_tokens.weight" not in trained(both)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"train": ["layer.0"]}, "training.train names 'layer.0', and the model has no such weight", "did you mean 'layers'?"),
        ({"freeze": ["layers.2"]}, "training.freeze names 'layers.2', and the model has no such weight", "layers are 0 to 1"),
        ({"train": ["mlp.layers"]}, "the model has no such weight", "names are like model.embed_tokens.weight"),
        ({"freeze": ["*"]}, "training.freeze leaves nothing to train", ""),
        ({"train": ["mlp", "norm"], "freeze": ["model.norm"]}, "training.train names 'norm', and training.freeze", ""),
        ({"train": ["embed_tokens"], "freeze": ["lm_head"]}, "training.train names 'embed_tokens', and training.freeze", ""),
    ],
)  # fmt: skip
def test_pattern_without_effect_is_refused_by_name(settings, message, hint):
    with pytest.raises(UsageError) as caught:
        select_weights(tiny_llama(), **settings)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_frozen_embeddings_stay_frozen():
    model = tiny_llama()
    freeze_embeddings(model)
    select_weights(model, freeze=["layers.0"])
    assert not any("embed" in name for name in trained(model))
    with pytest.raises(UsageError, match=r"training\.train_embeddings freezes all that it means"):
        select_weights(model, train=["lm_head", "layers.1"])
