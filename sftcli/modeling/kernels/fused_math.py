"""What norms and gated feed-forward blocks compute, forward and backward, on rows of numbers (T, D).

Intermediates are made again or overwritten in the backward pass rather than kept; sums are float32.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from sftcli.runtime import Context

Activation = Callable[[torch.Tensor], torch.Tensor]


Gradients = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Gate(Protocol):
    """What a gated feed-forward block multiplies: ``act(gated) * upped``, (T, F) each."""

    def product(self, gated: torch.Tensor, upped: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        ...

    def again(self, gated: torch.Tensor, upped: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        """Return the product in a backward pass, and what makes of its gradient those of ``gated`` and ``upped``.

        That is called once, when nobody needs the product any more; it may overwrite its gradient and all three.
        """
        ...


class KeptGate(Context, Protocol):
    """What a feed-forward block keeps besides tensors."""

    gate: Gate


class AnyGate:
    """``Gate`` of any activation: which one it is, only the model knows, so autograd derives it."""

    def __init__(self, act: Activation) -> None:
        self.act = act

    def product(self, gated: torch.Tensor, upped: torch.Tensor) -> torch.Tensor:
        """Return ``act(gated) * upped``."""
        return self.act(gated).mul_(upped)

    def again(self, gated: torch.Tensor, upped: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        """Return the product and its gradients."""
        with torch.enable_grad():
            leaf = gated.detach().requires_grad_()
            activated = self.act(leaf)
        product = activated.detach() * upped

        def gradients(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            of_upped = torch.mul(activated.detach(), gradient, out=product)
            (of_gated,) = torch.autograd.grad(activated, leaf, gradient.mul_(upped))
            return of_gated, of_upped

        return product, gradients


def norm_epsilon(norm: torch.nn.Module) -> float | None:
    """Return the epsilon of a transformers norm, or None if unknown."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


def class_forward(module: torch.nn.Module, x: torch.Tensor, *more: object, **rest: object) -> torch.Tensor:
    """Return what ``module`` makes of ``x`` by its class, whatever stands in the place of its ``forward``."""
    made: torch.Tensor = type(module).forward(module, x, *more, **rest)
    return made


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether a call of ``module`` does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def has_dropout(module: torch.nn.Module, *, attends: bool) -> bool:
    """Return whether ``module`` may apply dropout in training; that of attention counts where it ``attends``.

    Some modules keep the share as a number, some read it from their configuration when they run.
    """
    values = [
        pair
        for part in module.modules()
        for owner in (part, getattr(part, "config", None))
        if owner is not None
        for pair in vars(owner).items()
    ]
    shares = [value for name, value in values if "drop" in name.lower() and (attends or "att" not in name)]
    shares += [part.p for part in module.modules() if isinstance(part, torch.nn.Dropout)]
    return any(isinstance(share, int | float) and share > 0 for share in shares)


def norm_scale(rows: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return ``1 / rms`` of each row, (T, 1) float32."""
    return torch.rsqrt(rows.float().square().mean(-1, keepdim=True) + epsilon)


def normed(rows: torch.Tensor, gain: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``gain * rows * scale``, rounded where the modules of transformers round."""
    normal = (rows.float() * scale).to(rows.dtype)
    return normal.mul_(gain) if gain.dtype == normal.dtype else normal * gain


def norm_backward(
    gradient: torch.Tensor, rows: torch.Tensor, gain: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of ``rows`` and ``gain`` from that of what ``normed`` makes of them."""
    normal = rows.float() * scale
    along = gradient.float() * normal
    grad_gain = along.sum(0).to(gain.dtype)
    mean = torch.mv(along, gain.float())[:, None] / rows.shape[-1]
    grad_rows = torch.mul(gradient.float(), gain, out=along)  # the gradient of ``normal``
    return grad_rows.sub_(normal.mul_(mean)).mul_(scale).to(rows.dtype), grad_gain


def gate_and_up(
    rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a feed-forward block multiplies, (T, F) each; ``gate`` and ``up`` are (F, D)."""
    return functional.linear(rows, gate), functional.linear(rows, up)


def feed_forward_backward(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gated: torch.Tensor,
    upped: torch.Tensor,
    gating: Gate,
    *,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of ``rows`` and of the weights of gate, up and down, where ``needs`` says so."""
    gate, up, down = weights
    needs_rows, needs_gate, needs_up, needs_down = needs
    product, gradients = gating.again(gated, upped)
    grad_down = gradient.t() @ product if needs_down else None
    grad_gated, grad_upped = gradients(gradient @ down)
    grad_rows = (grad_gated @ gate).addmm_(grad_upped, up) if needs_rows else None
    grad_gate = grad_gated.t() @ rows if needs_gate else None
    grad_up = grad_upped.t() @ rows if needs_up else None
    return grad_rows, grad_gate, grad_up, grad_down
