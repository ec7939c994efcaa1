"""Models of random weights, built on the device, and rows of random tokens."""

import copy
import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from sftcli.data.example import Example
from sftcli.data.reading.record import Origin
from sftcli.runtime import peak_memory_bytes
from tests.support.training import ExampleList

CPU = torch.device("cpu")
PAD_ID = 2
_TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
_KINDS = {
    "tiny": (LlamaConfig, _TINY | {"tie_word_embeddings": True}),
    "tinyqwen": (Qwen2Config, _TINY | {"tie_word_embeddings": False}),
    "smol": (LlamaConfig, {  # SmolLM2-135M
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }),
    "qwen15": (Qwen2Config, {  # Qwen2.5-1.5B
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "llama8b": (LlamaConfig, {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def config_of(kind: str, vocabulary: int | None = None) -> PretrainedConfig:
    """Return the configuration of a ``kind``, with another ``vocabulary`` where one is given."""
    make, sizes = _KINDS[kind]
    sizes = sizes | ({"vocab_size": vocabulary} if vocabulary else {})
    return make(
        **sizes, max_position_embeddings=8192, bos_token_id=1, eos_token_id=PAD_ID, pad_token_id=PAD_ID
    )


def model_of(
    kind: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: int | None = None,
) -> PreTrainedModel:
    """Return a model whose weights were drawn on ``device``: equal seeds give equal ones on equal devices."""
    return model_of_config(config_of(kind, vocabulary), device=device, dtype=dtype, seed=seed)


def model_of_config(
    config: PretrainedConfig, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """Return the same for a configuration."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.get_input_embeddings().padding_idx = None
    return model


def copy_on(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a copy of ``model`` on ``device``."""
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def random_rows(
    count: int, *, vocabulary: int, mean: int = 250, longest: int = 1024, seed: int = 0
) -> ExampleList:
    """Return rows as long as those of instruction data, about half of their tokens with loss, few tokens often."""
    generator = np.random.default_rng(seed)
    made = ExampleList()
    for line in range(count):
        length = int(np.clip(generator.lognormal(math.log(mean) - 0.25, 0.7), 12, longest))
        ids = (3 + np.minimum(generator.zipf(1.4, size=length), vocabulary - 4)).astype(np.int32)
        mask = np.arange(length) >= length - max(2, int(length * generator.uniform(0.3, 0.7)))
        made.append(Example(input_ids=ids, loss_mask=mask, origin=Origin(path="random", line=line + 1)))
    return made


def random_prompts(count: int, *, vocabulary: int, longest: int) -> list[list[int]]:
    """Return prompts of 4 tokens and more."""
    generator = np.random.default_rng(0)
    return [
        generator.integers(3, vocabulary, size=int(generator.integers(4, longest))).tolist()
        for _ in range(count)
    ]


def memory_of(device: torch.device) -> dict[str, float]:
    """Return the most gigabytes that this process held, since the last reset on CUDA."""
    if device.type == "cuda":
        return {
            "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_GB": torch.cuda.max_memory_reserved() / 1e9,
        }
    return {"peak_GB": peak_memory_bytes(device) / 1e9}
