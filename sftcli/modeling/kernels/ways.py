"""Which faster form the parts of a decoder take, by device: what is tried for each, best first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch.nn import functional

from sftcli.modeling.kernels.fused_layer import GATED, layer_forward
from sftcli.modeling.kernels.fused_math import (
    AnyGate,
    Gate,
    KeptGate,
    class_forward,
    feed_forward_backward,
    gate_and_up,
    has_hooks,
    norm_backward,
    norm_epsilon,
    norm_scale,
    normed,
)
from sftcli.modeling.kernels.liger import LigerGate, gated_product, has_liger, turned
from sftcli.modeling.kernels.low_rank import low_rank_forward
from sftcli.modeling.kernels.rotary import Turn
from sftcli.runtime import Context, applied

Forward = Callable[..., Any]  # of a module and its input


class RmsNorm(torch.autograd.Function):
    """``weight * x / rms(x)``, from ``x`` and one number a row kept instead of three tensors of the size of ``x``."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return the normed ``x`` (..., D)."""
        scale = norm_scale(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return normed(x, weight, scale)

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and ``weight``."""
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = norm_backward(
            gradient.flatten(0, -2), x.flatten(0, -2), weight, scale.flatten(0, -2)
        )
        return grad_x.view_as(x), grad_weight if ctx.needs_input_grad[1] else None, None


class GatedFeedForward(torch.autograd.Function):
    """``down(act(gate(x)) * up(x))``, with the product made again in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: KeptGate,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        gating: Gate,
    ) -> torch.Tensor:
        """Return (..., D) for ``x`` (..., D); ``gate`` and ``up`` are (F, D), ``down`` is (D, F)."""
        gated, upped = gate_and_up(x, gate, up)
        ctx.save_for_backward(x, gate, up, down, gated, upped)
        ctx.gate = gating
        return functional.linear(gating.product(gated, upped), down)

    @staticmethod
    def backward(ctx: KeptGate, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and of the three weights."""
        x, gate, up, down, gated, upped = ctx.saved_tensors
        rows, flat, gated, upped = (part.flatten(0, -2) for part in (gradient, x, gated, upped))
        grad_x, *weights = feed_forward_backward(
            rows,
            flat,
            (gate, up, down),
            gated,
            upped,
            ctx.gate,
            needs=ctx.needs_input_grad[:4],
        )
        return None if grad_x is None else grad_x.view_as(x), *weights, None


class Part(StrEnum):
    """A part of a decoder that has faster forms."""

    NORM = "norm"
    GATE = "gated feed-forward block"
    ROTARY = "attention with rotary positions"
    LOW_RANK = "linear layer with an adapter"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A faster form.

    ``forward`` is what a module runs; for rotary positions it is what turns queries and keys. ``by`` is whose kernel it is: it
    stands in the records of a run, since another one rounds otherwise.
    """

    forward: Forward | Turn
    by: str = ""  # our own
    is_there: Callable[[], bool] = lambda: True


def _own_norm(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return class_forward(self, hidden_states)
    return applied(RmsNorm, hidden_states, self.weight, norm_epsilon(self))


def _norm_of_torch(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the norm as one kernel, forward and backward: on CUDA, since torch 2.9."""
    weight: Any = self.weight
    if not torch.is_grad_enabled() or weight.dtype != hidden_states.dtype:
        return class_forward(self, hidden_states)
    return functional.rms_norm(hidden_states, hidden_states.shape[-1:], weight, norm_epsilon(self))


def _own_feed_forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    parts = _projections(self)
    if not torch.is_grad_enabled() or not all(map(_is_bare_linear, parts)):  # adapters put more around it
        return class_forward(self, x)
    return applied(GatedFeedForward, x, *(part.weight for part in parts), AnyGate(self.act_fn))  # type: ignore[arg-type]


def _feed_forward_by_liger(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return class_forward(self, x)
    gate, up, down = parts = _projections(self)
    if all(map(_is_bare_linear, parts)):
        return applied(GatedFeedForward, x, *(part.weight for part in parts), LigerGate())
    made: torch.Tensor = down(gated_product(gate(x), up(x)))
    return made


def _projections(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [getattr(module, name) for name in GATED]


def _is_bare_linear(part: torch.nn.Module) -> bool:
    return type(part) is torch.nn.Linear and getattr(part, "bias", None) is None and not has_hooks(part)


_OWN_NORM, _OWN_GATE = Way(forward=_own_norm), Way(forward=_own_feed_forward)
WAYS: Mapping[str, Mapping[Part, Sequence[Way]]] = {
    "cpu": {
        Part.NORM: (_OWN_NORM,),
        Part.GATE: (_OWN_GATE,),
        Part.LAYER: (Way(forward=layer_forward),),
    },
    "cuda": {
        Part.NORM: (Way(forward=_norm_of_torch, by="torch"), _OWN_NORM),
        Part.GATE: (Way(forward=_feed_forward_by_liger, by="liger", is_there=has_liger), _OWN_GATE),
        Part.ROTARY: (Way(forward=turned, by="liger", is_there=has_liger),),
        Part.LOW_RANK: (Way(forward=low_rank_forward),),
    },
}
"""What is tried on devices of a type; another type takes that of a CPU."""
WITH_ADAPTER = frozenset({"cuda"})
"""Where the same is tried for a model with an adapter. On a CPU it would move the numbers of runs and save little."""


def ways_on(device: torch.device, *, has_adapter: bool) -> Mapping[Part, Sequence[Way]]:
    """Return what is tried on ``device``, best first."""
    if has_adapter and device.type not in WITH_ADAPTER:
        return {}
    return WAYS.get(device.type, WAYS["cpu"])
