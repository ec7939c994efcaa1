"""Products of few rows with the weights of a model, laid out once for the processor that reads them for every token."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sftcli.runtime import has_bf16_products, total_memory_bytes

Product = Callable[[torch.Tensor], torch.Tensor]  # (T, in) -> (T, out)
MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]  # of a weight, (out, in), and a bias

_LARGEST_SHARE = 0.1  # of the machine's memory that weights may take a second time
_LARGEST_SHARE_IN_TRAINING = 0.05  # which takes nine times as much already
_ROWS = 8  # the number of rows that a layout is made for; it serves any other
_ROUNDING = 2.0**-24  # of float32: what another order of sums moves


def products_of(weights: Sequence[torch.Tensor]) -> tuple[MakeProduct, torch.dtype]:
    """Return what makes the products of a model whose weights are ``weights``, and the type of their rows and results.

    A CPU with bfloat16 matrix units reads a weight in blocks of its own, into which each product would copy it first: they
    are made here, once. Without such units torch computes bfloat16 products at half the speed of float32 ones, and these
    read twice the bytes; weights that are numbers of 16 bits are laid out for products of FBGEMM, which read them as float16
    and compute in float32. Either needs memory for a second copy.
    """
    device, dtype = weights[0].device, weights[0].dtype
    if device.type != "cpu" or any(weight.dtype != dtype for weight in weights):
        return _plain, dtype
    fits = _fit_twice(weights, _LARGEST_SHARE)
    if dtype == torch.bfloat16 and has_bf16_products(device):
        return (_blocked if fits and _has_blocks() else _plain), dtype
    if _has_halves() and fits and all(map(_are_halves, weights)):
        return _halves, torch.float32
    return _plain, dtype


def are_blocked_in_training(weights: Sequence[torch.Tensor]) -> bool:
    """Return whether ``products_of`` makes blocks of ``weights``, whatever numbers they hold, and few enough beside a training.

    No number is looked at, as there for products of FBGEMM.
    """
    return (
        all(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in weights)
        and has_bf16_products(weights[0].device)
        and _has_blocks()
        and _fit_twice(weights, _LARGEST_SHARE_IN_TRAINING)
    )


def _fit_twice(weights: Sequence[torch.Tensor], share: float) -> bool:
    """Return whether ``weights`` as numbers of 16 bits take no more than this share of the memory."""
    return 2 * sum(weight.numel() for weight in weights) <= share * total_memory_bytes(weights[0].device)


def _has_blocks() -> bool:
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    turned = weight.t()  # once, as each operation has its price in a step
    return partial(torch.mm, mat2=turned) if bias is None else partial(torch.addmm, bias, mat2=turned)


def _blocked(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise

    def product(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = multiply(rows, blocks, bias, "none", [], "")
        return result

    return product


def _halves(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(
        weight.detach().float(), None if bias is None else bias.detach().float()
    )
    multiply = torch.ops.quantized.linear_dynamic_fp16

    def product(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = multiply(rows, packed)
        return result

    return product


def _has_halves() -> bool:
    """Return whether torch has FBGEMM, which is for processors of x86, and would use it."""
    return torch.backends.quantized.engine in {"x86", "fbgemm"} and all(
        hasattr(torch.ops.quantized, name) for name in ("linear_prepack_fp16", "linear_dynamic_fp16")
    )


def _are_halves(weight: torch.Tensor) -> bool:
    """Return whether ``weight`` as float16 is what it is, but for what rounding moves a sum with its greatest number.

    Weights of bfloat16 are: float16 has more digits, and lacks only the smallest of numbers.
    """
    weight = weight.detach()
    lost = (weight.half().float() - weight.float()).abs().amax()
    return bool(lost <= _ROUNDING * weight.abs().amax())  # not where one is too great: that is infinite
