"""Kernels of layers that keep a state along the row: gated delta nets, Mamba and short convolutions.

transformers takes them from packages of their own, on a GPU, and computes in plain torch where these are missing. The kernels can
be told where the documents of a row begin; the plain forms cannot, and refuse.
"""

import sys
from collections.abc import Mapping
from importlib.util import find_spec

import torch

# Function in the module of a family -> package to import, and what it is installed by.
_KERNELS: Mapping[str, tuple[str, str]] = {
    "torch_chunk_gated_delta_rule": ("fla", "flash-linear-attention"),
    "chunk_kimi_delta_attention": ("fla", "flash-linear-attention"),
    "causal_conv1d_fn": ("causal_conv1d", "causal-conv1d"),
    "mamba2_chunk_scan": ("mamba_ssm", "mamba-ssm"),
    "mamba_selective_scan": ("mamba_ssm", "mamba-ssm"),
}


def missing_kernels(model: torch.nn.Module) -> tuple[str, ...]:
    """Return what would have to be installed for the kernels of the layers of ``model`` with a state; nothing where there are none."""
    if not has_convolutions(model):
        return ()
    code = sys.modules[type(model).__module__]
    wanted = [kernel for function, kernel in _KERNELS.items() if hasattr(code, function)]
    return tuple(dict.fromkeys(name for package, name in wanted if find_spec(package) is None))


def has_convolutions(model: torch.nn.Module) -> bool:
    """Return whether ``model`` convolves along the row, as all layers with a state do that are known here."""
    return any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
