"""Prints how far Liger's kernels, in Triton's interpreter on a CPU, are from torch: a process of its own, since both look at the environment."""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import liger_kernel.ops.rope
import liger_kernel.ops.swiglu  # noqa: F401
import torch
import triton.runtime.interpreter as interpreter
from torch.nn import functional

from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.modeling.kernels.fused_math import AnyGate
from sftcli.modeling.kernels.liger import LigerGate, gated_product, turned
from sftcli.modeling.kernels.rotary import tried_turns
from sftcli.modeling.kernels.ways import WAYS
from tests.support.training import tiny_llama

ROWS, WIDTH = 6, 1536


class _Number(float):
    """A number that knows ``to``, as those of compiled kernels do."""

    def to(self, dtype):
        return float(self)


def adapt_interpreter():
    launch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang_tensor

    def typed(value):
        return _Number(value) if type(value) is float else value

    def run(self, *args, **named):
        return launch(self, *map(typed, args), **{name: typed(value) for name, value in named.items()})

    def patch(tensor, *scope):  # newer numpy makes no int of an array of one element
        patched(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.GridExecutor.__call__, interpreter._patch_lang_tensor = run, patch


def off(found, expected):
    return max(
        float((a.detach() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(found, expected, strict=True)
    )


def gate():
    parts = [torch.randn(ROWS, WIDTH) for _ in range(3)]

    def made(function):
        leaves = [part.clone().requires_grad_() for part in parts[:2]]
        product = function(*(leaf.clone() for leaf in leaves))
        return [product.detach().clone(), *torch.autograd.grad(product, leaves, parts[2].clone())]

    return off(made(gated_product), made(lambda gated, upped: functional.silu(gated) * upped))


def gate_again():
    gated, upped, back = (torch.randn(ROWS, WIDTH) for _ in range(3))

    def made(way):
        product, gradients = way.again(gated.clone(), upped.clone())
        return [product.clone(), *gradients(back.clone())]

    return off(made(LigerGate()), made(AnyGate(functional.silu)))


def rotary():
    module = tiny_llama().model.layers[0].self_attn
    own, found = tried_turns(module, turned, torch.device("cpu"))
    return off(found, own)


def whole():
    """Fuse a model on the CPU with the forms of CUDA: its loss and gradients."""
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(1))

    def made(model):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters())]

    plain, fused = tiny_llama(), tiny_llama()
    WAYS["cpu"] = WAYS["cuda"]
    fusion = fuse_layers(fused)
    return {
        "fused": list(fusion.fused),
        "left_alone": list(fusion.left_alone),
        "off": off(made(fused), made(plain)),
    }


if __name__ == "__main__":
    adapt_interpreter()
    torch.manual_seed(0)
    found = {"gate": gate(), "gate again": gate_again(), "rotary": rotary(), "model": whole()}
    sys.stdout.write(json.dumps(found))
