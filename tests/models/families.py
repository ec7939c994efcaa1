"""Tiny random models of the families that transformers knows, with the tokenizer and the template of the default model.

Only what makes a family what it is differs from the values that all have. Windows and chunks are shorter than the rows, and
scales far from the neutral ones, or nothing would be tried.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.support.smollm2 import STOP_ID, VOCABULARY, lay_tokenizer

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": STOP_ID,
    "pad_token_id": STOP_ID,
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 2048, "n_inner": 128,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 32,
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "residual_dropout",
         "activation_dropout", "layerdrop", "embedding_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
         "classifier_dropout"), 0.0),
}  # fmt: skip
_SLIDING_LAYERS = ["sliding_attention", "full_attention"] * 2
_MOSTLY_SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
_LINEAR_LAYERS = ["linear_attention", "full_attention"] * 2
_CONV_LAYERS = ["conv", "full_attention"] * 2
_LINEAR = {
    "layer_types": _LINEAR_LAYERS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
_SCALED = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
_PLAIN = (
    "llama", "ministral3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi3", "olmo",
    "olmo2", "olmoe", "glm4_moe_lite", "deepseek_v4", "lfm3", "exaone_moe", "bloom", "gpt2", "gpt_bigcode",
    "gpt_neox", "apertus", "ernie4_5", "hunyuan_v1_dense", "hy_v3", "seed_oss", "minicpm3", "dots1",
    "helium", "arcee", "afmoe", "nanochat", "jais2", "bitnet", "mimo_v2_flash",
    "solar_open", "hyperclovax", "flex_olmo", "youtu",
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {name: {} for name in _PLAIN} | {
    "llama_rope3": {
        "model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor":
        8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    },
    "llama4_text": {
        "attention_chunk_size": 32, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128,
        "no_rope_layers": [1, 1, 1, 0], "layer_types": None,
    },
    "mistral": {"sliding_window": None},
    "mistral_swa": {"model_type": "mistral", "sliding_window": 24},
    "ministral": {"sliding_window": 24, "layer_types": _SLIDING_LAYERS},
    "mixtral": {"sliding_window": None},
    "qwen3_next": _LINEAR | {"partial_rotary_factor": 0.5},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "gemma2": {
        "sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": _MOSTLY_SLIDING},
    "gemma3n_text": {
        "sliding_window": 24, "layer_types": _SLIDING_LAYERS, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 49152, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size":
        [128, 128, 128, 128],
    },
    "gemma4_text": {
        "head_dim": 16, "sliding_window": 24, "layer_types": _SLIDING_LAYERS, "hidden_size_per_layer_input":
        16, "vocab_size_per_layer_input": 49152, "num_kv_shared_layers": 0, "global_head_dim": 16,
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "olmo3": {"sliding_window": 24, "layer_types": _MOSTLY_SLIDING},
    "olmo_hybrid": {"layer_types": _LINEAR_LAYERS},
    "granite": _SCALED,
    "granitemoe": _SCALED,
    "granite_swa": _SCALED | {"sliding_window": 24, "layer_types": _MOSTLY_SLIDING},
    "granitemoe_swa": _SCALED | {"sliding_window": 24, "layer_types": _MOSTLY_SLIDING},
    "hy_v4": {"index_n_heads": 2, "index_head_dim": 16},
    "granitemoehybrid": _SCALED | {
        "layer_types": ["mamba", "attention", "mamba", "attention"], "shared_intermediate_size": 64,
    },
    "granitemoehybrid_dense": _SCALED | {
        "model_type": "granitemoehybrid", "layer_types": ["attention", "attention", "attention",
        "attention"], "num_local_experts": 0, "shared_intermediate_size": 64,
    },
    "falcon": {
        "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False, "parallel_attn":
        True,
    },
    "falcon7b": {
        "model_type": "falcon", "new_decoder_architecture": False, "multi_query": True, "alibi": False,
        "bias": False, "parallel_attn": True,
    },
    "falcon_h1": {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {
        "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32, "expand": 2,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1, 3], "partial_rotary_factor": 0.5},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim":
        16, "mamba_ngroups": 1, "mamba_d_state": 16, "chunk_size": 32, "num_mem_blocks": 1, "adapter_rank":
        8, "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "nemotron": {"partial_rotary_factor": 0.5},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 32,
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
    },
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "glm_moe_dsa": {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 2048},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_method": "greedy"},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {
        "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 2048,
    },
    "gpt_oss": {"sliding_window": 24},
    "smollm3": {"no_rope_layer_interval": 4, "no_rope_layers": None, "layer_types": None},
    "lfm2": {"layer_types": _CONV_LAYERS, "block_ff_dim": 128, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONV_LAYERS, "num_dense_layers": 1},
    "exaone4": {"sliding_window": 24, "sliding_window_pattern": 4, "layer_types": None},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "sliding_window": 24, "layer_types": _MOSTLY_SLIDING},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neo": {
        "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 24,
    },
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 2048},
    "rwkv": {"context_length": 256, "attention_hidden_size": 64},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1,
    },
    "hunyuan_v1_moe": {"moe_topk": [2, 2, 2, 2]},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "minimax": {"layer_types": _LINEAR_LAYERS, "block_size": 32},
    "minimax_m2": {"rotary_dim": 8},
    "cwm": {"sliding_window": 24},
    "recurrent_gemma": {
        "attention_window_size": 24, "lru_width": 64, "block_types": ["recurrent", "recurrent",
        "attention"],
    },
    "vaultgemma": {
        "sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 4, "attention_heads": 4},
}  # fmt: skip
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
# Checkpoints of text and images: the values of their text; those of their tower are common to all.
TOWERS: dict[str, dict[str, Any]] = {
    "vlm_gemma3": FAMILIES["gemma3_text"],
    "vlm_gemma4": FAMILIES["gemma4_text"],
    "vlm_qwen3_5": FAMILIES["qwen3_5_text"],
    "vlm_qwen3_5_moe": FAMILIES["qwen3_5_moe_text"],
    "vlm_llama4": FAMILIES["llama4_text"],
    "vlm_qwen2_5_vl": _THREE_AXES,
    "vlm_glm4v": _THREE_AXES,
    **{
        f"vlm_{name}": {}
        for name in (
            "qwen3_vl", "mistral3", "smolvlm", "idefics3", "llava", "paligemma", "internvl", "mllama",
        )
    },
}  # fmt: skip
# What is refused, by family and column of the matrix; the reason is what the program says.
EXPECTED: dict[str, tuple[str, ...]] = {"vlm_paligemma": ("train",)}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2, "num_heads": 2,
    "out_hidden_size": 64, "patch_size": 14, "image_size": 28, "embed_dim": 32, "head_dim": 16, "num_key_value_heads": 2,
    "deepstack_visual_indexes": [0, 1], "fullatt_block_indexes": [1], "vision_output_dim": 64, "projector_input_dim": 64,
    "projector_output_dim": 64, "num_position_embeddings": 16, "global_head_dim": 16,
}  # fmt: skip
_IMAGE_TOKENS = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index",
    "boi_token_index", "eoi_token_index",
)  # fmt: skip
_OF_EACH_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "moe_layers",
    "layers_config",
)
_WITHOUT_HEAD_DIM = ("falcon", "gemma4")
# Weights that a model cannot do with at random: of states, positions, slopes, routers.
_LEFT = (
    "A_log", "dt_bias", "dt_proj", ".D", "time_decay", "time_first", "time_mix", "rg_lru", "recurrent_param", "slope",
    "e_score_correction_bias", "inv_freq", "conv1d", "sinks",
)  # fmt: skip


def build_family(name: str, folder: Path) -> Path:
    """Write the model called ``name`` to ``folder``, with weights with which every part of it matters."""
    config = _tower_config(name) if name in TOWERS else family_config(name)
    make = AutoModelForImageTextToText if name in TOWERS else AutoModelForCausalLM
    torch.manual_seed(0)
    model = make.from_config(config, dtype=torch.float32)
    enliven(model)
    model.save_pretrained(folder)
    generation = folder / "generation_config.json"
    own = json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else {}
    lay_tokenizer(folder)
    laid = json.loads(generation.read_text(encoding="utf-8"))
    generation.write_text(json.dumps(own | laid), encoding="utf-8")
    return folder


def family_config(name: str) -> PretrainedConfig:
    """Return the configuration of a model of text alone."""
    values = dict(FAMILIES[name])
    model_type = values.pop("model_type", name)
    return _shrunk(CONFIG_MAPPING[model_type](), values)


def _tower_config(name: str) -> PretrainedConfig:
    kind = CONFIG_MAPPING[name.removeprefix("vlm_")]
    whole = kind()
    values: dict[str, Any] = {"text_config": _shrunk(whole.text_config, TOWERS[name]).to_dict()}
    if getattr(whole, "vision_config", None) is not None:
        values["vision_config"] = _shrunk(whole.vision_config, {}, common=_TOWER).to_dict()
    if getattr(whole, "audio_config", None) is not None:
        values["audio_config"] = None
    return kind(**values, **{token: 10 for token in _IMAGE_TOKENS if _has(whole, token)})


def _shrunk(
    default: PretrainedConfig, own: dict[str, Any], common: dict[str, Any] = _COMMON
) -> PretrainedConfig:
    """Return a configuration of the kind of ``default``: what is ``common`` as far as the kind has it, and its ``own``."""
    values = {key: value for key, value in common.items() if _has(default, key)}
    has_latent = "qk_rope_head_dim" in values
    if has_latent or default.model_type.startswith(_WITHOUT_HEAD_DIM):
        values.pop("head_dim", None)
    if has_latent and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= {key: None for key in _OF_EACH_LAYER if key in vars(default)}  # they have the default's length
    return type(default)(**values | own)


def _has(config: PretrainedConfig, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # noqa: BLE001 - properties of configurations raise what they like
        return False


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Draw weights with which logits spread, gains are not 1 and biases not 0: those of transformers hide errors."""
    generator = torch.Generator().manual_seed(0)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(weight) for module in ends if module is not None for weight in module.parameters()}
    for name, weight in model.named_parameters():
        if any(part in name for part in _LEFT) or not weight.is_floating_point():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if id(weight) in tables and weight.dim() == 2:
            weight.copy_(noise * 0.25)
        elif weight.dim() >= 2:
            weight.copy_(noise / math.sqrt(weight.shape[-1]))
        else:
            weight.add_(noise * 0.1)
