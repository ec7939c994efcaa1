"""Answers of models whose caches or positions are of another kind are those of the model on whole texts."""

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BambaConfig,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    MambaConfig,
    MiniMaxConfig,
    MptConfig,
    PretrainedConfig,
    Qwen3Config,
    RwkvConfig,
)

from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.modeling.decoding.kv_cache import CachedRows, UncachedRow
from tests.support.architectures import SMALL
from tests.support.decoding import answers

ENDS = {"vocab_size": 514, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
GATED = {**SMALL, "head_dim": 8}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4),
    "qwen3": Qwen3Config(**GATED),
    "gemma2": Gemma2Config(**GATED, sliding_window=8, query_pre_attn_scalar=8),
    "mpt": MptConfig(**ENDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "gpt_neo": GPTNeoConfig(
        **ENDS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    "bloom": BloomConfig(**ENDS, hidden_size=32, n_layer=2, n_head=4),
    "rwkv": RwkvConfig(**ENDS, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64),
    "mamba": MambaConfig(**ENDS, hidden_size=32, num_hidden_layers=2, state_size=8),
    "falcon_mamba": FalconMambaConfig(**ENDS, hidden_size=32, num_hidden_layers=2, state_size=8),
    "minimax": MiniMaxConfig(
        **GATED, layer_types=["linear_attention", "full_attention"], block_size=8, num_local_experts=2
    ),
    "bamba": BambaConfig(
        **SMALL, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
}  # fmt: skip
TOKENS = 6
PROMPTS = [[9, 10, 11, 30], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [7, 8]]


def build(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Auto.from_config(CONFIGS[name], dtype=torch.float32).eval()
        for parameter, weight in model.named_parameters():
            if weight.ndim == 2 and "A_log" not in parameter and "conv" not in parameter:
                torch.nn.init.normal_(weight, std=0.3)  # logits that lie apart
    return model


@torch.inference_mode()
def read_anew(model, prompt: list[int]) -> list[int]:
    text = list(prompt)
    for _ in range(TOKENS):
        text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_are_those_of_whole_texts(name: str):
    model = build(name)
    rows = answers(choose_decoder(model), PROMPTS, max_new_tokens=TOKENS)
    assert [row.ids for row in rows] == [read_anew(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_models_with_an_ordinary_cache_decode_many_rows_together(name: str):
    decoder = choose_decoder(build(name))
    assert isinstance(decoder.make_rows(4, ()), CachedRows)
    assert decoder.note == ""


def test_a_model_that_is_read_anew_for_each_token_says_so():
    decoder = choose_decoder(build("rwkv"))
    assert isinstance(decoder.make_rows(4, ()), UncachedRow)
    assert decoder.note.startswith("RwkvForCausalLM has no usable KV cache here")
