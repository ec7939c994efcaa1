"""Answers end with the last position that a model was made for, and prompts without room are refused."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sftcli.errors import DataError, MismatchError
from sftcli.modeling.decoding.decoder import choose_decoder
from tests.support.decoding import answers


def small_llama(**rope):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            **rope,
        )
    )


MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
                  word_embed_proj_dim=8, max_position_embeddings=16)
    ),
    "llama": small_llama,
}  # fmt: skip
PROMPTS = [[*range(3, 9)], [*range(3, 19)], [5]]


@pytest.mark.parametrize("name", MODELS)
def test_answer_ends_with_the_last_position(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    rows = answers(choose_decoder(model), PROMPTS, max_new_tokens=40)
    assert [(len(prompt) + len(row.ids), row.finish) for prompt, row in zip(PROMPTS, rows, strict=True)] == [
        (17, "length")
    ] * 3
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = [*prompt]
        for token in row.ids:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model", "prompt", "asked"),
    [
        (MODELS["gpt2"], 6, 4),
        (lambda: small_llama(rope_parameters=SCALED), 16, 17),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1)), 30, 5),
    ],
    ids=["short", "scaled", "without positions"],
)
def test_answers_within_the_reach_of_a_model_are_as_long_as_asked_for(model, prompt, asked):
    (row,) = answers(choose_decoder(model().eval()), [[5] * prompt], max_new_tokens=asked)
    assert len(row.ids) == asked


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ([3] * 17, DataError, "a prompt has 17 tokens, and the model was made for 16 positions"),
        (
            [3, 64],
            MismatchError,
            "a prompt holds token 64, and the embeddings of GPT2LMHeadModel have 64 rows",
        ),
    ],
)
def test_prompt_without_room_is_refused_by_name(prompt, kind, message):
    with pytest.raises(kind, match=message):
        answers(choose_decoder(MODELS["gpt2"]().eval()), [[3], prompt])
