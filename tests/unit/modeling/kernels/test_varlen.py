"""Which attention torch's kernel for packed rows can do, by release, and how it is told."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from sftcli.modeling.kernels.varlen import SIGNATURES, Asked, signature_of, varlen_on
from tests.support.varlen import Calls, attend_strictly, kernel_of

PLAIN = Asked(dtype=torch.bfloat16, heads=4, key_heads=2, head_dim=64, value_dim=64)
RELEASES = ("2.10", "2.11", "2.12")
HALF = frozenset({torch.bfloat16, torch.float16})


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_is_known_by_its_signature(release):
    assert kernel_of(release).signature.since == release


def test_torch_as_it_is_installed_has_a_known_signature():
    assert signature_of(varlen_attn) in SIGNATURES


def test_a_signature_that_no_release_has_is_refused_by_name():
    kernel = replace(
        kernel_of("2.12"), signature=signature_of(lambda query, key, value: query), release="9.9"
    )
    assert "torch 9.9 it takes other arguments" in kernel.lacks(PLAIN)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": torch.float32}, "16 bits, and this model in fp32"),
        ({"head_dim": 264, "value_dim": 264}, "up to 256, and this model of 264"),
        ({"head_dim": 60, "value_dim": 60}, "multiple of 8, and this model of 60"),
        ({"value_dim": 32}, r"keys (64) and of values (32) differ"),
        ({"key_heads": 3}, "4 heads of queries cannot share 3"),
        ({"dropout": 0.1}, "no dropout"),
    ],
)
def test_what_no_release_can_do_is_named(release, changed, words):
    kernel = kernel_of(release, dtypes=HALF)
    assert kernel.lacks(PLAIN) is None
    assert words in kernel.lacks(replace(PLAIN, **changed))


def test_an_old_card_is_named():
    assert "8.0 or more, and this one has 7.5" in kernel_of("2.12", capability=(7, 5)).lacks(PLAIN)
    assert kernel_of("2.12", capability=(8, 0)).lacks(PLAIN) is None


@pytest.mark.parametrize("release", RELEASES)
def test_only_the_first_release_lacks_windows_and_scales(release):
    kernel, is_first = kernel_of(release), release == "2.10"
    assert (kernel.lacks(replace(PLAIN, window=128)) is not None) == is_first
    assert (kernel.lacks(replace(PLAIN, scale=0.1)) is not None) == is_first
    assert (kernel.lacks(replace(PLAIN, scale=-0.125)) is not None) == is_first
    for power in (1, 0.5, 4):  # scores are exact with these
        assert kernel.lacks(replace(PLAIN, scale=power / 8)) is None


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_the_root_of_the_head_size_is_no_scale_of_its_own(dim):
    asked = replace(PLAIN, head_dim=dim, value_dim=dim, scale=dim**-0.5)
    assert kernel_of("2.10").lacks(asked) is None


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("scale", [None, 1 / 8, 1 / 16, 1 / 2])
def test_a_scale_gives_the_same_bits_in_every_release(release, scale):
    asked = replace(PLAIN, scale=scale)
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2)
    parts = [
        torch.randn(1, count, 12, 64, generator=generator).bfloat16().requires_grad_() for count in heads
    ]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = attend_strictly(
        *(part[0].transpose(0, 1) for part in parts), bounds, bounds, 7, 7, scale=scale, window=(-1, 0)
    )
    calls = Calls()
    found = kernel_of(release, calls).attend(*parts, bounds=bounds, longest=7, asked=asked)
    assert calls.windows == [(-1, 0)]
    assert torch.equal(found[0], expected)
    for one, other in zip(
        torch.autograd.grad(found.float().square().sum(), parts),
        torch.autograd.grad(expected.float().square().sum(), parts),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_there_is_no_such_kernel_on_a_cpu():
    assert varlen_on(torch.device("cpu")) is None
