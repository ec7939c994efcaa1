"""Routed experts: which of them the tokens of a pass choose, and each document's by themselves.

The latter is for comparisons that must not see how many tokens an expert gets.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch

_NAME = "experts"  # what transformers calls the module that all experts of a block are


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that hold the experts of a block each, by name."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == _NAME}


@contextmanager
def chosen_experts(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what the newest pass inside the block told each module of experts: the numbers of experts (tokens, chosen).

    Experts that are not told it, but get the tokens of every expert, are left out.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32):
                    found[name] = value.detach().flatten(0, -2)

        return hook

    modules = experts_of(model).items()
    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def experts_by_document(model: torch.nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Let the experts of ``model`` take the tokens of documents of ``lengths`` one document after the other.

    An expert makes one product of all tokens that are sent to it, and how that rounds depends on their number, so on the
    other documents. Experts see tokens one by one, so nothing else changes.
    """
    found = list(experts_of(model).values())
    kept = [(module, module.__dict__.get("forward")) for module in found]
    for module in found:
        module.forward = _split(module.forward, lengths)
    try:
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _split(forward: Callable[..., torch.Tensor], lengths: Sequence[int]) -> Callable[..., torch.Tensor]:
    lengths = [length for length in lengths if length]

    def run(*args: object, **kwargs: object) -> torch.Tensor:
        if not any(_is_by_token(value, lengths) for value in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        columns = [_pieces(value, lengths) for value in args]
        named = {name: _pieces(value, lengths) for name, value in kwargs.items()}
        made = [
            forward(*(column[index] for column in columns), **{name: named[name][index] for name in named})
            for index in range(len(lengths))
        ]
        return torch.cat(made)

    return run


def _pieces(value: object, lengths: Sequence[int]) -> Sequence[object]:
    """Return what each document gets of ``value``: its tokens' part, or all of what is not by token."""
    if _is_by_token(value, lengths):
        split: tuple[torch.Tensor, ...] = value.split(list(lengths))
        return split
    return [value] * len(lengths)


def _is_by_token(value: object, lengths: Sequence[int]) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == sum(lengths)
