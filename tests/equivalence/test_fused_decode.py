"""The decoding step in few operations computes what the model's own forward does."""

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sftcli.modeling.decoding import fused_decode
from sftcli.modeling.decoding.decoder import checked_decoder, choose_decoder, decoder_in_training
from sftcli.modeling.decoding.fused_decode import FusedRows, fuse
from sftcli.modeling.decoding.kv_cache import CachedRows
from tests.support.decoding import answers
from tests.support.tiny_model import tiny_config

PROMPTS = [[5, 9, 33], [7], [100, 200, 300, 301, 302], [11, 12], [400] * 140]


def build(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if family == "llama":
            return LlamaForCausalLM(tiny_config()).eval()
        shape = tiny_config().to_dict()
        kept = {key: shape[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                            "num_attention_heads", "num_key_value_heads")}  # fmt: skip
        model = Qwen2ForCausalLM(Qwen2Config(**kept, tie_word_embeddings=False)).eval()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        return model


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_that_go_on_and_rows_that_begin_get_the_logits_of_forward(family, prefix):
    plain, faster = build(family), build(family)
    fused = fuse(faster)
    assert fused is not None
    shared = list(range(50, 50 + prefix))
    pairs = CachedRows(plain, 8), FusedRows(fused, 8, shared)
    prompts = [shared + prompt for prompt in PROMPTS]
    entering = iter([prompts[:2], [], prompts[2:3], [], [], prompts[3:], [], [], []])
    with torch.inference_mode():
        for step, new in enumerate(entering):
            tokens = torch.arange(3 + step, 3 + step + pairs[0].state.size)
            torch.testing.assert_close(*[rows.advance(tokens, new) for rows in pairs], atol=1e-5, rtol=0)
            if step in {2, 3, 7}:
                for rows in pairs:
                    rows.remove(1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("max_rows", [1, 3])
@pytest.mark.parametrize("prefix", [0, 9])
def test_answers_of_a_fused_model_are_those_of_the_plain_one(family, max_rows, prefix):
    prompts = [[*range(50, 50 + prefix), *prompt] for prompt in PROMPTS]
    plain, fused = (
        answers(
            choose(build(family)),
            prompts,
            max_new_tokens=20,
            stop_ids=frozenset(range(60, 90)),
            max_rows=max_rows,
        )
        for choose in (checked_decoder, choose_decoder)
    )
    assert plain == fused


def test_fusing_leaves_weights_and_forward_as_they_were():
    plain, faster = build("qwen2"), build("qwen2")
    fuse(faster)
    before, after = plain.state_dict(), faster.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(plain(ids).logits, faster(ids).logits)


def test_decoder_in_training_follows_the_weights_and_leaves_them_where_they_are(monkeypatch):
    monkeypatch.setattr(
        fused_decode, "are_blocked_in_training", lambda _: True
    )  # as on processors with bfloat16 units
    model = build("qwen2")
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    decoder = decoder_in_training(model)
    assert isinstance(decoder.make_rows(2, ()), FusedRows)
    ask = partial(answers, prompts=PROMPTS, max_new_tokens=20, stop_ids=frozenset(), max_rows=3)
    before = ask(decoder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    assert ask(decoder) == ask(checked_decoder(model)) != before
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    model(torch.tensor([PROMPTS[2]])).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_model_in_training_whose_processor_has_no_layout_for_it_decodes_with_its_own_forward():
    decoder = decoder_in_training(build("llama"))  # in float32
    assert isinstance(decoder.make_rows(2, ()), CachedRows)


def test_model_with_a_projection_of_another_kind_is_left_to_its_own_forward():
    model = build("llama")

    class Adapted(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Adapted(32, 32, bias=False)
    assert fuse(model) is None
    assert isinstance(choose_decoder(model).make_rows(2, ()), CachedRows)
