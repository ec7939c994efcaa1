"""Kernels that cannot run on tensors without numbers, as operations that read and write what they would.

Torch's own norm is one operation forward and one backward on CUDA, and a dozen elsewhere; Liger's kernels need a GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

_NORM = "torch.nn.functional.rms_norm"
_LIGER = "sftcli.modeling.kernels.liger"


@torch.library.custom_op("counted::one_kernel", mutates_args=())
def one_kernel(reads: list[torch.Tensor], like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Read ``reads`` and write tensors of the shapes of ``like``."""
    return [torch.empty_like(part) for part in like]


one_kernel.register_fake(lambda reads, like: [torch.empty_like(part) for part in like])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return one_kernel([x, weight], [x])[0]

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        made = one_kernel([gradient, x, weight], [x, weight] if ctx.needs_input_grad[1] else [x])
        return (*made, None)[:2]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gated, upped):
        ctx.save_for_backward(gated, upped)
        return one_kernel([gated, upped], [gated])[0]

    @staticmethod
    def backward(ctx, gradient):
        gated, upped = ctx.saved_tensors
        return tuple(one_kernel([gradient, gated, upped], [gated, upped]))


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return tuple(one_kernel([query, key, cos, sin], [query, key]))

    @staticmethod
    def backward(ctx, of_query, of_key):
        return *one_kernel([of_query, of_key, *ctx.saved_tensors], [of_query, of_key]), None, None


_FUNCTIONS = {"LigerSiLUMulFunction": _Gated, "LigerRopeFunction": _Turned}


@contextmanager
def stand_ins(*, has_liger: bool) -> Iterator[None]:
    """Put them where training calls what they stand for."""
    with ExitStack() as stack:
        stack.enter_context(patch(_NORM, lambda x, shape, weight, epsilon: _Norm.apply(x, weight)))
        stack.enter_context(patch(f"{_LIGER}._function", lambda module, name: _FUNCTIONS[name]))
        stack.enter_context(patch(f"{_LIGER}._PACKAGES", () if has_liger else ("no_such_package",)))
        yield
