"""Tiny random models of the families that GGUF is written for, far from neutral in all that their files must tell."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.support.architectures import SMALL
from tests.support.tiny_tokenizer import build_tiny_tokenizer

_OWN: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
    },
    "gemma2": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24, "num_hidden_layers": 7},
    "smollm3": {"num_hidden_layers": 4},
    "granite": {
        "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 3.0,
    },
}  # fmt: skip


def build_gguf_family(family: str, folder: Path, **changes: object) -> PreTrainedModel:
    """Return a model, whose tokenizer is written to ``folder``, with gains that are not 1 and biases that are not 0."""
    config = CONFIG_MAPPING[family](**SMALL | _OWN.get(family, {}) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.data += 0.1 * torch.randn_like(weight)
    build_tiny_tokenizer(folder)
    model.save_pretrained(folder)
    return model
