"""Answers of models whose caches or positions are of another kind are those of transformers, each prompt alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BambaConfig,
    BloomConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MiniMaxConfig,
    MptConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    RwkvConfig,
    XGLMConfig,
)

from sftcli.modeling.decoding import decoder as decoder_module
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.modeling.decoding.fused_decode import FusedRows, fuse
from sftcli.modeling.decoding.kv_cache import CachedRows, SingleRow, UncachedRow
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
        **ENDS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16
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
    "recurrent_gemma": RecurrentGemmaConfig(
        **SMALL, attention_window_size=8, lru_width=32, block_types=["recurrent", "attention"]
    ),
    "xglm": XGLMConfig(**ENDS, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4),
    "qwen2 with a window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=0
    ),
    "dynamic rope": Qwen3Config(
        **GATED | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    ),
    "longrope": Phi3Config(
        **SMALL,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 16,
        },
    ),
}  # fmt: skip
TOKENS = 6
# The last is shorter than the windows and lengths above, and its answer longer; what is tried beforehand is shorter.
PROMPTS = [[9, 10, 11, 30], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [7, 8], list(range(30, 44))]


def build(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Auto.from_config(CONFIGS[name], dtype=torch.float32).eval()
        for parameter, weight in model.named_parameters():
            if weight.ndim == 2 and "A_log" not in parameter and "conv" not in parameter:
                torch.nn.init.normal_(weight, std=0.3)  # logits that lie apart
    return model


def generated(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = copy.deepcopy(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_are_those_of_transformers(name: str):
    model = build(name)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    rows = answers(choose_decoder(model), PROMPTS, max_new_tokens=TOKENS)
    assert [row.ids for row in rows] == expected


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_models_with_an_ordinary_cache_decode_many_rows_together(name: str):
    decoder = choose_decoder(build(name))
    assert isinstance(decoder.make_rows(4, ()), CachedRows)
    assert decoder.note == ""


@pytest.mark.parametrize("name", ["bamba", "minimax", "recurrent_gemma", "rwkv", "gpt_neo", "longrope"])
def test_others_decode_one_row_with_the_cache_of_the_model(name: str):
    decoder = choose_decoder(build(name))
    assert isinstance(decoder.make_rows(4, ()), SingleRow)
    assert decoder.note == ""


class Forgetful(GPT2LMHeadModel):
    """Forgets what a cache holds, when more than one token is behind it."""

    def forward(self, input_ids, position_ids=None, cache=None, logits_to_keep=0, **others):
        if input_ids.shape[1] == 1:
            cache, position_ids = None, None
        return super().forward(
            input_ids, position_ids=position_ids, cache=cache, logits_to_keep=logits_to_keep, **others
        )


def test_a_model_whose_cache_is_wrong_is_read_anew_for_each_token_and_says_so():
    model = Forgetful(CONFIGS["gpt2"]).eval()
    model.load_state_dict(build("gpt2").state_dict())
    decoder = choose_decoder(model)
    assert isinstance(decoder.make_rows(4, ()), UncachedRow)
    assert decoder.note.startswith("Forgetful has no usable KV cache here")
    rows = answers(decoder, PROMPTS, max_new_tokens=TOKENS)
    assert [row.ids for row in rows] == [generated(build("gpt2"), prompt) for prompt in PROMPTS]


def test_a_faster_pass_that_differs_from_the_model_is_not_taken(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    fused = fuse(model)
    assert isinstance(choose_decoder(model).make_rows(4, ()), FusedRows)
    fused.norm = torch.zeros_like
    monkeypatch.setattr(decoder_module, "fuse", lambda _model: fused)
    assert isinstance(choose_decoder(model).make_rows(4, ()), CachedRows)
