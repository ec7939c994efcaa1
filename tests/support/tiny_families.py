"""Tiny random models whose files differ from what transformers holds: experts, buffers, towers, heads beside the model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from tests.support.tiny_tokenizer import build_tiny_tokenizer

_TEXT = {
    "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "tie_word_embeddings": True,
}  # fmt: skip
_TOWER = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
WITH_BUFFERS = {
    "glm4_moe": _EXPERTS,
    "deepseek_v3": _EXPERTS | _LATENT,
    "gemma4_text": {
        "sliding_window": 16, "vocab_size_per_layer_input": 514, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip

_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 28, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16, "head_dim": 8,
    "deepstack_visual_indexes": [0], "vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 16,
    "max_num_tiles": 1, "num_global_layers": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
_OF_IMAGES = {
    "image_token_id": 500, "image_token_index": 500, "video_token_id": 501, "vision_start_token_id": 502,
    "vision_end_token_id": 503, "boi_token_index": 502, "eoi_token_index": 503,
}  # fmt: skip
# The values of their text; of an image there are as many tokens as its tower makes.
MULTIMODAL = {
    "qwen3_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "mistral3": {},
    "gemma3": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mllama": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "llama4": {
        "attention_chunk_size": 16, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64,
        "num_local_experts": 2, "no_rope_layers": [1, 0], "layer_types": None,
    },
}  # fmt: skip


def build_multimodal(folder: Path, family: str, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of text and images, with gains and biases that are not 1 and 0."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = CONFIG_MAPPING[family]
        whole = kind()
        parts = {
            "text_config": _known(_TEXT, whole.text_config) | MULTIMODAL[family],
            "vision_config": _known(_VISION, whole.vision_config),
        }
        model = AutoModelForImageTextToText.from_config(kind(**parts, **_known(_OF_IMAGES, whole)))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.rand_like(weight) / 8)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return build_tiny_tokenizer(folder)


def _known(values: dict[str, object], config: PretrainedConfig) -> dict[str, object]:
    return {key: value for key, value in values.items() if hasattr(config, key)}


def build_with_buffers(folder: Path, family: str, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of a family whose files hold buffers, which stay float32 whatever the ``dtype`` of the weights."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **(_TEXT | WITH_BUFFERS[family]))
        )
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            for name, buffer in model.state_dict().items():
                if name not in parameters and buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer) / 8)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return build_tiny_tokenizer(folder)


def build_with_tower(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model of text and images, with a head for several tokens, as all of Qwen 3.5 are."""
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen3_5", text_config=_TEXT | _LINEAR, vision_config=_TOWER, tie_word_embeddings=True
        )
        AutoModelForImageTextToText.from_config(config).to(dtype).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        weights |= {f"mtp.{part}.weight": torch.randn(32, 64).to(dtype) for part in ("fc", "layers.0.down")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return build_tiny_tokenizer(folder)
