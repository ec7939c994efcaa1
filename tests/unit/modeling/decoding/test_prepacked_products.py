"""A weight that is laid out once gives the products that it gave before."""

import pytest
import torch

from sftcli.modeling.decoding import products
from sftcli.modeling.decoding.products import products_of
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
    make, its = products_of([weight])
    product = make(weight, bias)
    with torch.inference_mode():
        ours = product(given.to(its))
    exact = torch.nn.functional.linear(
        given.double(), weight.double(), None if bias is None else bias.double()
    )
    assert ours.dtype == its
    torch.testing.assert_close(ours.double(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0)


@pytest.mark.skipif(not has_bf16_products(CPU), reason="the processor has no bfloat16 matrix units")
def test_weights_are_laid_out_again_only_where_memory_has_room(monkeypatch):
    weight = torch.ones(48, 32, dtype=torch.bfloat16)
    assert products_of([weight])[0] is products._blocked
    assert products_of([weight.float()])[0] is products._halves
    monkeypatch.setattr(products, "total_memory_bytes", lambda _device: 9 * weight.nbytes)
    assert products_of([weight])[0] is products._plain


@pytest.mark.skipif(not products._has_halves(), reason="torch has no FBGEMM here")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_weights_of_16_bits_are_read_as_such_and_computed_with_in_float32(with_bias, rows):
    generator = torch.Generator().manual_seed(0)
    weight, bias, given = (torch.randn(shape, generator=generator) for shape in ((48, 32), (48,), (rows, 32)))
    weight = weight.bfloat16().float()
    bias = bias if with_bias else None
    make, its = products_of([weight])
    assert (make, its) == (products._halves, torch.float32)
    exact = torch.nn.functional.linear(
        given.double(), weight.double(), None if bias is None else bias.double()
    )
    torch.testing.assert_close(make(weight, bias)(given).double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [1 + 2.0**-11, 70_000.0, float("inf")])
def test_weights_that_float16_lacks_stay_as_they_are(number):
    weight = torch.ones(4, 4)
    assert products_of([weight])[0] is not products._plain or not products._has_halves()
    weight[1, 2] = number
    assert products_of([weight])[0] is products._plain


def test_smallest_numbers_of_bfloat16_may_be_lost_beside_great_ones():
    weight = torch.tensor([[1.0, 1.2e-7 * (1 + 2.0**-7)]])
    assert products._are_halves(weight)
    assert not products._are_halves(weight[:, 1:])
