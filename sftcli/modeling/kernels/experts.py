"""Routed experts, document by document, for comparisons that must not see how many tokens an expert gets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

import torch

_NAME = "experts"  # what transformers calls the module that all experts of a block are


@contextmanager
def experts_by_document(model: torch.nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Let the experts of ``model`` take the tokens of documents of ``lengths`` one document after the other.

    An expert makes one product of all tokens that are sent to it, and how that rounds depends on their number, so on the
    other documents. Experts see tokens one by one, so nothing else changes.
    """
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == _NAME]
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
