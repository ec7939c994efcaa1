"""Norms and gated feed-forward blocks of decoders as single operations that keep less for the backward pass.

The modules stay where they are, with their weights and names; only what they run while gradients are recorded changes.
They are found by what they are made of, not by the name of a model, and each kind is tried on random input first: what
does not give the output and the gradients of the module itself is left alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType

import torch
from torch.autograd.function import FunctionCtx
from torch.nn import functional

_PARTS = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE = 1e-4  # of float32 sums in another order; another formula is off by far more
_PROBE_SHAPE = (2, 3)

Forward = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


class RmsNorm(torch.autograd.Function):
    """``weight * x / rms(x)``, from ``x`` and one number a row kept instead of three tensors of the size of ``x``."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return the normed ``x`` (..., D), rounded where the modules of transformers round."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and ``weight``."""
        x, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        normal = x.float().mul_(scale)
        wide = gradient.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_weight = (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * weight  # the gradient of ``normal``
        along = (wide * normal).mean(-1, keepdim=True)
        return wide.sub_(normal.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


class GatedFeedForward(torch.autograd.Function):
    """``down(act(gate(x)) * up(x))``, with the product made again in the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        act: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return (..., D) for ``x`` (..., D); ``gate`` and ``up`` are (F, D), ``down`` is (D, F)."""
        gated, upped = functional.linear(x, gate), functional.linear(x, up)
        ctx.save_for_backward(x, gate, up, down, gated, upped)
        ctx.act = act  # type: ignore[attr-defined]
        return functional.linear(act(gated).mul_(upped), down)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and of the three weights."""
        x, gate, up, down, gated, upped = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, *needs = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        rows, flat = gradient.flatten(0, -2), x.flatten(0, -2)
        with torch.enable_grad():
            gated, upped = (part.flatten(0, -2).detach().requires_grad_() for part in (gated, upped))
            product = ctx.act(gated) * upped  # type: ignore[attr-defined]
        grad_gated, grad_upped = torch.autograd.grad(product, (gated, upped), rows @ down)
        grad_x = (grad_gated @ gate).addmm_(grad_upped, up).view_as(x) if needs_x else None
        weights = (
            left.t() @ right if needed else None
            for needed, left, right in zip(
                needs,
                (grad_gated, grad_upped, rows),
                (flat, flat, product.detach()),
                strict=True,
            )
        )
        return grad_x, *weights, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Names of the module classes that run as single operations now, and of those that gave something else when tried."""

    fused: tuple[str, ...]
    left_alone: tuple[str, ...]


def fuse_layers(model: torch.nn.Module) -> Fusion:
    """Let the norms and feed-forward blocks of ``model`` run as single operations where that gives the same."""
    verdicts: dict[type[torch.nn.Module], bool] = {}
    for module, forward in _candidates(model):
        kind = type(module)
        if kind not in verdicts:
            verdicts[kind] = _gives_the_same(module, forward)
        if verdicts[kind]:
            module.forward = MethodType(forward, module)
    names = {
        verdict: sorted({k.__name__ for k in verdicts if verdicts[k] is verdict}) for verdict in (True, False)
    }
    return Fusion(fused=tuple(names[True]), left_alone=tuple(names[False]))


def restore_layers(model: torch.nn.Module) -> None:
    """Undo ``fuse_layers``."""
    for module, _ in _candidates(model):
        module.__dict__.pop("forward", None)


def _candidates(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Forward]]:
    for module in model.modules():
        children = dict(module.named_children())
        if _is_plain_norm(module):
            yield module, _norm
        elif set(_PARTS) <= set(children) <= {*_PARTS, "act_fn"} and callable(
            getattr(module, "act_fn", None)
        ):
            yield module, _feed_forward


def _is_plain_norm(module: torch.nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"] and _epsilon(module) is not None


def _epsilon(module: torch.nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _norm(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    return RmsNorm.apply(hidden_states, self.weight, _epsilon(self))  # type: ignore[no-any-return,no-untyped-call]


def _feed_forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    parts = [getattr(self, name) for name in _PARTS]
    if not torch.is_grad_enabled() or not all(map(_is_bare_linear, parts)):  # adapters put more around it
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return GatedFeedForward.apply(x, *(part.weight for part in parts), self.act_fn)  # type: ignore[no-any-return,no-untyped-call]


def _is_bare_linear(part: torch.nn.Module) -> bool:
    return (
        type(part) is torch.nn.Linear
        and getattr(part, "bias", None) is None
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
    )


@torch.enable_grad()
def _gives_the_same(module: torch.nn.Module, forward: Forward) -> bool:
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (*_PROBE_SHAPE, weight.shape[-1])
    x, back = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    results = []
    for run in (type(module).forward, forward):
        fed = x.clone().requires_grad_()
        wanted = [fed, *(part for part in module.parameters() if part.requires_grad)]
        try:
            made = run(module, fed)
            results.append((made.detach(), *torch.autograd.grad(made, wanted, back)))
        except (TypeError, AttributeError, RuntimeError):
            return False
    return all(
        left.shape == right.shape and torch.allclose(left, right, rtol=_TOLERANCE, atol=_TOLERANCE)
        for left, right in zip(*results, strict=True)
    )
