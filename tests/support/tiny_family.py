"""Models of many families for unit tests: those of the scripts in ``tests/models``, with few tokens."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.families import enliven, family_config

IDS = torch.arange(3, 40)[None]


def build_tiny_family(name: str, folder: Path) -> Path:
    """Write a model of the family called ``name``, without a tokenizer."""
    config = family_config(name)
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(config, key):
            setattr(config, key, 64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enliven(model)
    model.save_pretrained(folder)
    return folder


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits for ``IDS``."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far two tensors are from each other, as a part of their size."""
    return float((one - other).norm() / one.norm())
