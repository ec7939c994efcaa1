"""Modern LLM checkpoints from nothing: seeded random weights, a few thousand of them."""

from pathlib import Path

import torch

from sftcli.modeling.formats.pt_file import write_pt
from sftcli.modeling.modern_lm.config import ModernLMConfig
from sftcli.modeling.modern_lm.model import ModernLMForCausalLM


def tiny_modern_config(**changes) -> ModernLMConfig:
    values = {
        "vocab_size": 514, "d_model": 32, "n_layers": 2, "n_heads": 4, "ffn_hidden_size": 48, "max_seq_len": 512,
        "initializer_range": 0.3,
    }  # fmt: skip
    return ModernLMConfig(**(values | changes))


def tiny_modern(*, seed: int = 0, **changes) -> ModernLMForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ModernLMForCausalLM(tiny_modern_config(**changes)).eval()


def build_tiny_pt(path: Path, **changes) -> Path:
    """Write such a model as the pipeline's pretraining stage leaves it."""
    model = tiny_modern(**changes)
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    write_pt(path, config=model.config, weights=dict(model.named_parameters()), optimizer={}, group=group, step=0,
             run_name="tiny")  # fmt: skip
    return path
