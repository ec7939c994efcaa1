"""Small random models of several kinds, as they differ in positions, windows, norms and heads."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.support.tiny_modern import tiny_modern
from tests.support.training import tiny_llama

SMALL = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=514, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


_BUILDERS = {
    "llama": tiny_llama,
    "gpt2": _gpt2,  # absolute positions
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=8, head_dim=8)),
    "modern": lambda: tiny_modern(initializer_range=0.1),
}
ARCHITECTURES = tuple(_BUILDERS)


def build_architecture(name: str) -> PreTrainedModel:
    """Return the model of ``name``, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _BUILDERS[name]()
