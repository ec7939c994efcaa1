"""How often a step waits for the device, counted on tensors without numbers that take the ways of CUDA."""

import pytest
from transformers import Qwen2Config

from benchmarks.gpu.count import count_step
from tests.support.tiny_model import tiny_config


def tiny_qwen2():
    return Qwen2Config(**{name: value for name, value in tiny_config().to_dict().items() if name in SHARED})


SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


ADAFACTOR = {"optimizer": "adafactor"}


@pytest.mark.parametrize("config", [tiny_config, tiny_qwen2])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"passes": 4},
        {"rank": 2},
        {"settings": {"gradient_checkpointing": True}},
        {"settings": ADAFACTOR},
        {"settings": ADAFACTOR | {"max_grad_norm": 0.5}},  # numbers that are read are 1, so that this clips
        {"settings": {"loss": "dft"}},
    ],
)
def test_a_step_waits_for_the_device_once(config, how):
    counts = count_step(config(), tokens=256, documents=8, **how)
    assert counts.waits.total() == 1, counts.waits
    assert all("copies.py" in place for place in (*counts.waits, *counts.uploads))
