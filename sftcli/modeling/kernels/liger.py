"""Kernels of Liger (Hsu et al. 2024, arXiv:2410.10989), where its package is installed; it needs Triton and a GPU."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any

import torch

_PACKAGES = ("liger_kernel", "triton")
Gradients = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def has_liger() -> bool:
    """Return whether the packages are installed, without importing them."""
    return all(find_spec(name) is not None for name in _PACKAGES)


def faults() -> tuple[type[Exception], ...]:
    """Return what a package that does not fit the machine may raise at its first call: it compiles its kernels there."""
    triton: Any = sys.modules.get("triton.errors")
    of_triton = () if triton is None else (triton.TritonError,)
    return (ImportError, OSError, CalledProcessError, *of_triton)


def gated_product(gated: torch.Tensor, upped: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gated) * upped`` (..., F); its backward pass overwrites both."""
    product: torch.Tensor = _function("swiglu", "LigerSiLUMulFunction").apply(gated, upped)
    return product


def turned(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn ``query`` and ``key`` (B, heads, T, D) by their positions, in their place; ``cos`` and ``sin`` are (1 or B, T, D)."""
    made: tuple[torch.Tensor, torch.Tensor] = _function("rope", "LigerRopeFunction").apply(
        query, key, cos, sin
    )
    return made


class LigerGate:
    """``Gate`` of SiLU as one kernel forward and one backward."""

    def product(self, gated: torch.Tensor, upped: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gated) * upped``."""
        return gated_product(gated, upped)

    def again(self, gated: torch.Tensor, upped: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        """Return the product, and what makes of its gradient those of both, in their place."""
        leaves = (gated.detach().requires_grad_(), upped.detach().requires_grad_())
        with torch.enable_grad():
            product = gated_product(*leaves)

        def gradients(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            of_gated, of_upped = torch.autograd.grad(product, leaves, gradient)
            return of_gated, of_upped

        return product.detach(), gradients


def _function(module: str, name: str) -> Any:  # noqa: ANN401 - the package has no types
    return getattr(import_module(f"liger_kernel.ops.{module}"), name)
