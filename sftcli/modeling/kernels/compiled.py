"""Decoder layers compiled by torch, one graph for all of them and all lengths, where gradients are recorded.

Held-out loss and answers run as they did: they would be graphs of their own, and a cache of keys and values is not traced.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from sftcli.modeling.kernels.fused_math import class_forward

BY = "torch.compile"
_ATTENTION = "Attention"  # how the names of its classes end


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of ``model``, which are the classes that transformers says may not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: torch.nn.Module, *, traces_attention: bool, backend: str = "inductor") -> None:
    """Let each layer of ``model`` run compiled; that happens in its first pass.

    Args:
        model: Its layers run what their classes say.
        traces_attention: Whether attention is a part of the graph. One that loops over documents is not: each number of them
            would be a graph of its own.
        backend: What torch compiles with.
    """
    for layer in decoder_layers(model):
        compiled = torch.compile(MethodType(type(layer).forward, layer), dynamic=True, backend=backend)
        layer.forward = MethodType(_switch(compiled), layer)
        if not traces_attention:
            for part in layer.modules():
                if type(part).__name__.endswith(_ATTENTION):
                    part.forward = torch.compiler.disable(part.forward)


def run_as_before(model: torch.nn.Module) -> None:
    """Undo ``compile_layers``."""
    for layer in decoder_layers(model):
        for part in layer.modules():
            part.__dict__.pop("forward", None)


def _switch(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: torch.nn.Module, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - of any layer
        if not torch.is_grad_enabled():
            return class_forward(self, *args, **named)
        return compiled(*args, **named)

    return forward


def names_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Return how a run records that the layers of ``model`` are compiled."""
    kinds = {type(layer).__name__ for layer in decoder_layers(model)}
    return tuple(sorted(f"{kind} by {BY}" for kind in kinds))
