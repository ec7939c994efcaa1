"""Attention of a row of documents as one operation equals causal attention of each document by itself."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sftcli.modeling.kernels.cpu_attention import CpuAttention, can_attend

LENGTHS = [5, 1, 600, 37]


def parts(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key and value (1, heads, T, D), as views of (1, T, heads, D), and a gradient."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    query, key, value = (
        torch.randn(1, tokens, heads, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (6, 2, 2)
    )
    return [query, key, value, torch.randn(1, tokens, 6, 16, generator=generator).to(dtype)]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    documents = zip(*(part.split(LENGTHS, dim=2) for part in (query, key, value)), strict=True)
    seen = [
        scaled_dot_product_attention(*document, is_causal=True, scale=scale, enable_gqa=True)
        for document in documents
    ]
    return torch.cat(seen, dim=2).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_each_document(dtype, tolerance, scale):
    *ours, gradient = parts(dtype)
    exact = [part.detach().double().requires_grad_() for part in ours]
    assert can_attend(*ours)
    made = CpuAttention.apply(*ours, LENGTHS, scale)
    wanted = plain(*exact, scale)
    torch.testing.assert_close(made.double(), wanted, atol=tolerance, rtol=tolerance)
    made.backward(gradient)
    wanted.backward(gradient.double())
    for part, other in zip(ours, exact, strict=True):
        assert part.grad.dtype == dtype
        difference = (part.grad.double() - other.grad).norm() / other.grad.norm()
        assert difference <= tolerance


def test_what_it_does_not_know_is_left_to_torch():
    query, key, value, _ = parts(torch.float32)
    assert not can_attend(query.double(), key.double(), value.double())
    assert not can_attend(query, key, value[..., :8])
    assert not can_attend(query, key.transpose(2, 3).contiguous().transpose(2, 3), value)
