"""Answers of models that have learned their positions end with the last one, and prompts without room are refused."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from sftcli.errors import MismatchError
from sftcli.modeling.decoding.decoder import choose_decoder
from tests.support.decoding import answers
from tests.support.training import tiny_llama

LEARNED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
                  word_embed_proj_dim=8, max_position_embeddings=16)
    ),
}  # fmt: skip
PROMPTS = [[*range(3, 9)], [*range(3, 19)], [5]]


@pytest.mark.parametrize("name", LEARNED)
def test_answer_ends_with_the_last_position(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LEARNED[name]().eval()
    rows = answers(choose_decoder(model), PROMPTS, max_new_tokens=40)
    assert [(len(prompt) + len(row.ids), row.finish) for prompt, row in zip(PROMPTS, rows, strict=True)] == [
        (17, "length")
    ] * 3
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = [*prompt]
        for token in row.ids:
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_shorter_answers_and_computed_positions_are_as_long_as_asked_for():
    row = answers(choose_decoder(LEARNED["gpt2"]().eval()), PROMPTS[:1], max_new_tokens=4)[0]
    assert len(row.ids) == 4
    row = answers(choose_decoder(tiny_llama().eval()), [[5] * 511], max_new_tokens=5)[0]
    assert len(row.ids) == 5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([3] * 17, "a prompt has 17 tokens, and GPT2LMHeadModel has learned 16 positions"),
        ([3, 64], "a prompt holds token 64, and the embeddings of GPT2LMHeadModel have 64 rows"),
    ],
)
def test_prompt_without_room_is_refused_by_name(prompt, message):
    with pytest.raises(MismatchError, match=message):
        answers(choose_decoder(LEARNED["gpt2"]().eval()), [[3], prompt])
