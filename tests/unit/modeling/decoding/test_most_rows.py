"""How many rows are decoded together follows from the device and from what of its memory is free."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from sftcli.modeling.decoding import decode as decode_module

GIB = 2**30


def a_model(device: str):
    """An 8B Llama as far as its cache goes: 128 KiB a token in bfloat16."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    return SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, config=config)


@pytest.mark.parametrize(
    ("free", "rows"),
    [
        (64 * GIB, 255),  # of 1,024 tokens, with what drawing a token takes, they take half of it
        (32 * GIB, 127),
        (400 * GIB, 1024),  # no more
        (1 * GIB, 32),  # as many as before, whatever is free
    ],
)
def test_on_cuda_keys_and_values_take_half_of_what_is_free(free, rows, monkeypatch):
    monkeypatch.setattr(decode_module, "reachable_memory_bytes", lambda device: free + 16 * GIB)
    monkeypatch.setattr(decode_module, "memory_bytes", lambda device: 16 * GIB)
    assert decode_module._most_rows(a_model("cuda"), 1024) == rows


def test_elsewhere_it_is_as_many_as_ever():
    assert decode_module._most_rows(a_model("cpu"), 10**9) == 32
