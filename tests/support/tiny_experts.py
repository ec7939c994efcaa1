"""Tiny random models with routed experts, of families that route in different ways."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.architectures import SMALL

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": _EXPERTS | {"num_experts": 8},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
}
# Its experts are not told who chose them: each gets all tokens, times what the router gives it.
UNTOLD = {
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "attention_chunk_size": 16,
        "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0],
    },
}  # fmt: skip


def build_experts(family: str, **changes) -> PreTrainedModel:
    """Return the model of ``family``, always with the same weights."""
    config = AutoConfig.for_model(family, **(SMALL | (FAMILIES | UNTOLD)[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("router.weight", "gate.weight")):
                    weight.normal_(std=0.5)  # some experts get most
    return model
