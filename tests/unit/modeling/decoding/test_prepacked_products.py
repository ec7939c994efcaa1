"""A weight that is laid out once gives the products that it gave before."""

import pytest
import torch

from sftcli.modeling.decoding import fused_decode
from sftcli.modeling.decoding.fused_decode import products_of
from sftcli.runtime import has_bf16_products

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_product_is_that_of_linear(dtype, with_bias, rows):
    generator = torch.Generator().manual_seed(0)
    weight, bias, given = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((48, 32), (48,), (rows, 32))
    )
    bias = bias if with_bias else None
    product = products_of([weight])(weight, bias)
    with torch.inference_mode():
        ours = product(given)
    exact = torch.nn.functional.linear(
        given.double(), weight.double(), None if bias is None else bias.double()
    )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0)


@pytest.mark.skipif(not has_bf16_products(CPU), reason="the processor has no bfloat16 matrix units")
def test_weights_are_laid_out_again_only_where_memory_has_room(monkeypatch):
    weight = torch.ones(48, 32, dtype=torch.bfloat16)
    assert products_of([weight]) is fused_decode._blocked
    assert products_of([weight.float()]) is fused_decode._plain
    monkeypatch.setattr(fused_decode, "total_memory_bytes", lambda _device: 9 * weight.nbytes)
    assert products_of([weight]) is fused_decode._plain
