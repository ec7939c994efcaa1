"""Layers, norms and gated feed-forward blocks of decoders as few operations that keep less for the backward pass.

The modules stay where they are, with their weights and names; only what they run while gradients are recorded changes.
They are found by what they are made of, not by the name of a model, and each one is tried first, in training mode, with
what the model itself passes to it: what does not give the output and the gradients of the module is left alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import torch
from torch.nn import functional

from sftcli.memory_faults import Attempt
from sftcli.modeling.architecture import beside_text
from sftcli.modeling.kernels.fused_layer import (
    GATED,
    Passed,
    is_layer,
    layer_forward,
    observe_layers,
    try_on_documents,
)
from sftcli.modeling.kernels.fused_math import (
    Activation,
    KeptActivation,
    class_forward,
    feed_forward_backward,
    gate_and_up,
    has_dropout,
    has_hooks,
    norm_backward,
    norm_epsilon,
    norm_scale,
    normed,
)
from sftcli.runtime import Context, applied

_TOLERANCE = 1e-4  # of float32 sums in another order; another formula is off by far more
_PROBE_SHAPE = (2, 3)
_LAYER_SHAPE = (1, 5)

Forward = Callable[..., torch.Tensor]  # of a module and its input


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
        ctx: KeptActivation,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        act: Activation,
    ) -> torch.Tensor:
        """Return (..., D) for ``x`` (..., D); ``gate`` and ``up`` are (F, D), ``down`` is (D, F)."""
        gated, upped = gate_and_up(x, gate, up)
        ctx.save_for_backward(x, gate, up, down, gated, upped)
        ctx.act = act
        return functional.linear(act(gated).mul_(upped), down)

    @staticmethod
    def backward(ctx: KeptActivation, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``x`` and of the three weights."""
        x, gate, up, down, gated, upped = ctx.saved_tensors
        rows, flat, gated, upped = (part.flatten(0, -2) for part in (gradient, x, gated, upped))
        grad_x, *weights = feed_forward_backward(
            rows,
            flat,
            (gate, up, down),
            gated,
            upped,
            ctx.act,
            needs=ctx.needs_input_grad[:4],
        )
        return None if grad_x is None else grad_x.view_as(x), *weights, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Names of the module classes that run as single operations now, and of those that gave something else when tried.

    Where some modules of a class do and others do not, it stands in both, with how many.
    """

    fused: tuple[str, ...]
    left_alone: tuple[str, ...]
    parts: Sequence[tuple[torch.nn.Module, Forward]] = field(default=(), compare=False, repr=False)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let every module run what its class runs meanwhile."""
        for module, _ in self.parts:
            module.__dict__.pop("forward", None)
        try:
            yield
        finally:
            for module, forward in self.parts:
                module.forward = MethodType(forward, module)


def fuse_layers(model: torch.nn.Module) -> Fusion:
    """Let those layers, norms and feed-forward blocks of ``model`` run as few operations that give the same so."""
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        passed = observe_layers(model)
        seen: set[type[torch.nn.Module]] = set()
        tried = []
        for module, forward in _candidates(model):
            tried.append((module, *_judged(module, forward, passed, is_first=type(module) not in seen)))
            seen.add(type(module))
    model.train(was_training)
    for module, forward, is_same in tried:
        if is_same:
            module.forward = MethodType(forward, module)
    kinds = Counter(type(module) for module, *_ in tried)
    names = {
        verdict: tuple(sorted(_counted(kind, count, kinds[kind]) for kind, count in found.items()))
        for verdict in (True, False)
        for found in [Counter(type(module) for module, _, is_same in tried if is_same is verdict)]
    }
    parts = [(module, forward) for module, forward, is_same in tried if is_same]
    return Fusion(fused=names[True], left_alone=names[False], parts=parts)


def _counted(kind: type[torch.nn.Module], count: int, total: int) -> str:
    return kind.__name__ if count == total else f"{kind.__name__} ({count} of {total})"


def restore_layers(model: torch.nn.Module) -> None:
    """Undo ``fuse_layers``."""
    for module, _ in _candidates(model):
        module.__dict__.pop("forward", None)


def _judged(
    module: torch.nn.Module, forward: Forward, passed: dict[torch.nn.Module, Passed], *, is_first: bool
) -> tuple[Forward, bool]:
    """Return the faster form of ``module``, and whether it gives the same."""
    if forward is not layer_forward:
        is_random = has_dropout(module, attends=False)
        return forward, not is_random and _gives_the_same(module, forward, whole=is_first)
    if module not in passed or has_dropout(module, attends=True):
        return forward, False
    mine = passed[module]
    bound = partial(layer_forward, window=mine.window)
    return bound, _gives_the_same(module, bound, mine, whole=is_first)


def _candidates(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Forward]]:
    beside = beside_text(model)
    for name, module in model.named_modules():
        if beside and any(f"{name}.{weight}" in beside for weight, _ in module.named_parameters()):
            continue
        children = dict(module.named_children())
        if _is_plain_norm(module):
            yield module, _norm
        elif set(GATED) <= set(children) <= {*GATED, "act_fn"} and callable(getattr(module, "act_fn", None)):
            yield module, _feed_forward
        elif is_layer(module):
            yield module, layer_forward


def _is_plain_norm(module: torch.nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return (
        type(module).__name__.endswith("RMSNorm") and names == ["weight"] and norm_epsilon(module) is not None
    )


def _norm(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return class_forward(self, hidden_states)
    return applied(RmsNorm, hidden_states, self.weight, norm_epsilon(self))


def _feed_forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    parts = [getattr(self, name) for name in GATED]
    if not torch.is_grad_enabled() or not all(map(_is_bare_linear, parts)):  # adapters put more around it
        return class_forward(self, x)
    return applied(GatedFeedForward, x, *(part.weight for part in parts), self.act_fn)


def _is_bare_linear(part: torch.nn.Module) -> bool:
    return type(part) is torch.nn.Linear and getattr(part, "bias", None) is None and not has_hooks(part)


@torch.enable_grad()
def _gives_the_same(
    module: torch.nn.Module, forward: Forward, passed: Passed | None = None, *, whole: bool
) -> bool:
    """Compare output and gradients, each by its size: what is small, as gradients of queries are, must be right too.

    Gradients of matrices, which cost the most, are compared for the first of a class (``whole``): one module differs from
    another in what it computes, and the gradient of its input tells that.
    """
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (*(_PROBE_SHAPE if passed is None else _LAYER_SHAPE), weight.shape[-1])
    x, back = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    x.requires_grad_()
    wanted = [x, *(part for part in module.parameters() if part.requires_grad and (whole or part.ndim < 2))]
    with Attempt() as attempt:
        if passed is None:
            made = type(module).forward(module, x), forward(module, x)
        else:
            made = try_on_documents(module, forward, x, passed)
        plain, fused = ((one.detach(), *torch.autograd.grad(one, wanted, back)) for one in made)
    return not attempt.failed and all(
        left.shape == right.shape and bool((left - right).norm() <= _TOLERANCE * left.norm())
        for left, right in zip(plain, fused, strict=True)
    )
