"""Rotary positions of attention (RoPE, Su et al. 2021, arXiv:2104.09864) with another function in the place of the one that turns.

The attention itself is the model's own, with all that it does besides. A function that turns queries and keys in another way, as
by pairs of neighbors, is told apart by what it gives.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from sftcli.modeling.activations import KEEPS_PRODUCTS

_NAME = "apply_rotary_pos_emb"  # in each of transformers' files of a model
_TRIED = (2, 3)  # heads of queries and keys that share a head, tokens

Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # of queries, keys, cosines and sines


def turn_of(module: torch.nn.Module) -> Turn | None:
    """Return the function that the class of ``module`` turns queries and keys with; None where it does not."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(_NAME)


def forward_with(module: torch.nn.Module, turn: Turn) -> Callable[..., Any]:
    """Return what the class of ``module`` runs, but for ``turn`` where gradients are recorded and the whole head is turned."""
    plain = inspect.unwrap(type(module).forward)
    own = turn_of(module)
    assert isinstance(plain, FunctionType)
    assert own is not None

    def turned(
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *rest: object,
        **named: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_plain = not rest and not named and cos.ndim == 3 and cos.shape[-1] == query.shape[-1]
        if not is_plain or not torch.is_grad_enabled() or cos.dtype != query.dtype:
            return own(query, key, cos, sin, *rest, **named)
        if vars(module).get(KEEPS_PRODUCTS):
            query, key = query.clone(), key.clone()  # a kernel may turn them in their place
        return turn(query, key, cos, sin)

    # Not the function of its file, which all models of the family share.
    made = FunctionType(
        plain.__code__,
        plain.__globals__ | {_NAME: turned},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


def tried_turns(
    module: torch.nn.Module, turn: Turn, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs and gradients of the model's own function and of ``turn``, on random queries and keys.

    Raises:
        AttributeError: ``module`` has no ``head_dim``.
    """
    own, width = turn_of(module), int(module.head_dim)  # type: ignore[arg-type]
    assert own is not None
    generator = torch.Generator().manual_seed(0)
    heads, tokens = _TRIED

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    angles = random(1, tokens, width // 2).repeat(1, 1, 2)  # both halves of a head are turned alike
    parts = [random(1, tokens, count, width) for count in (2 * heads, heads)]
    back = [random(1, count, tokens, width) for count in (2 * heads, heads)]
    found = []
    for function in (own, turn):
        leaves = [part.clone().requires_grad_() for part in parts]
        # A copy: one that turns in their place may not do it to leaves.
        made = function(*(leaf.clone().transpose(1, 2) for leaf in leaves), angles.cos(), angles.sin())
        outputs = [one.detach().clone() for one in made]
        found.append([*outputs, *torch.autograd.grad(made, leaves, [one.clone() for one in back])])
    return found[0], found[1]
