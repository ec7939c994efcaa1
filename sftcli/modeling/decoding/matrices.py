"""Products with weights that stay the same, laid out for the processor once instead of at every product."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from sftcli.runtime import has_bf16_products, total_memory_bytes

Product = Callable[[torch.Tensor], torch.Tensor]  # (T, in) -> (T, out)
MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]  # of a weight, (out, in), and a bias

_LARGEST_SHARE = 0.1  # of the machine's memory that weights may take a second time
_ROWS = 8  # the number of rows that a layout is made for; it serves any other


def products_of(weights: Sequence[torch.Tensor]) -> MakeProduct:
    """Return what makes the products of a model whose weights are ``weights``.

    A CPU with bfloat16 matrix units reads a weight in blocks of its own, into which each product would copy it first. Where
    memory has room for a second copy the blocks are made here, once.
    """
    device = weights[0].device
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if (
        device.type == "cpu"
        and all(weight.dtype == torch.bfloat16 for weight in weights)
        and has_bf16_products(device)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and size <= _LARGEST_SHARE * total_memory_bytes(device)
    ):
        return _blocked
    return _plain


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return partial(F.linear, weight=weight, bias=bias)


def _blocked(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise

    def product(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = multiply(rows, blocks, bias, "none", [], "")
        return result

    return product
