"""A linear layer with a low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685) in eight kernels, forward and backward.

peft's own form takes twelve: it scales and adds in kernels of their own, where a matrix product can do both on its way.
The layers are found by what they are made of; nothing of peft is imported here.
"""

import copy
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from sftcli.modeling.kernels.fused_math import class_forward, has_hooks
from sftcli.runtime import Context, applied

_STAND_IN = (16, 4)  # width and rank of a layer that is tried
_PARTS = {"base_layer", "lora_A", "lora_B"}


class _KeptScale(Context, Protocol):
    """What is kept besides tensors."""

    scale: float


class LowRank(torch.autograd.Function):
    """``x W^T + bias + scale * (x down^T) up^T``, where ``W`` and ``bias`` do not train."""

    @staticmethod
    def forward(
        ctx: _KeptScale,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Return (..., O) for ``x`` (..., D); ``weight`` is (O, D), ``down`` (R, D), ``up`` (O, R)."""
        inner = _scaled_product(x.flatten(0, -2), down.t(), scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scale = scale
        made = functional.linear(x, weight, bias)
        made.view(-1, made.shape[-1]).addmm_(inner, up.t())
        return made

    @staticmethod
    def backward(ctx: _KeptScale, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x``, ``down`` and ``up``."""
        x, weight, down, up, inner = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_inner = _scaled_product(rows, up, ctx.scale)
        grad_x = (rows @ weight).addmm_(of_inner, down).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, of_inner.t() @ x.flatten(0, -2), rows.t() @ inner, None


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``scale * left @ right``: products can scale what they write."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _has_bias(part: nn.Linear) -> bool:
    """Return whether ``part`` adds something: torch's stub says that it always does."""
    return getattr(part, "bias", None) is not None


def has_low_rank(module: nn.Module) -> bool:
    """Return whether ``module`` is a plain linear layer with one adapter of two matrices, and nothing else around it."""
    layer: Any = module
    if {name for name, child in module.named_children() if any(True for _ in child.parameters())} != _PARTS:
        return False
    names: list[str] = list(getattr(layer, "active_adapters", []))
    if list(layer.lora_A) != names or len(names) != 1 or getattr(layer, "lora_variant", None):
        return False
    parts = _parts(layer)
    is_plain = all(type(part) is nn.Linear for part in parts)
    return (
        is_plain
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and not any(_has_bias(part) for part in parts[1:])
        and not getattr(layer, "fan_in_fan_out", False)
        and not any(weight.requires_grad for weight in parts[0].parameters())
    )


def low_rank_forward(self: nn.Module, x: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
    """Return what peft's layer gives, by way of ``LowRank`` where gradients are recorded in one precision."""
    layer: Any = self
    base, down, up = parts = _parts(layer)
    same = x.dtype == base.weight.dtype == down.weight.dtype == up.weight.dtype
    is_plain = same and not (args or named or layer.merged or layer.disable_adapters)
    if not is_plain or not torch.is_grad_enabled() or any(map(has_hooks, parts)):
        return class_forward(self, x, *args, **named)
    scale: float = layer.scaling[layer.active_adapters[0]]
    return applied(LowRank, x, base.weight, base.bias, down.weight, up.weight, scale)


def small_low_rank(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of ``module`` with small products of its own that are not zero, as those of a new adapter are."""
    layer: Any = module
    (name,) = layer.active_adapters
    width, rank = _STAND_IN
    made = copy.copy(module)
    fresh = {
        "base_layer": nn.Linear(width, width, bias=_has_bias(layer.base_layer)).requires_grad_(False),
        "lora_A": nn.ModuleDict({name: nn.Linear(width, rank, bias=False)}),
        "lora_B": nn.ModuleDict({name: nn.Linear(rank, width, bias=False)}),
    }
    made.__dict__["_modules"] = module._modules | {part: child.to(device) for part, child in fresh.items()}
    return made


def _parts(layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:  # noqa: ANN401 - of peft
    (name,) = layer.lora_A
    return layer.base_layer, layer.lora_A[name], layer.lora_B[name]
