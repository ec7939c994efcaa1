"""Newer flash attention in the place of torch's, by torch's own switch: where a package has it and it computes the same.

The switch holds for all flash attention of the process, so documents in a row and rows by themselves are both compared.
"""

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn import attention, functional

from sftcli.memory_faults import is_out_of_memory
from sftcli.modeling.kernels.varlen import Asked, Varlen

# What cards of a compute capability have kernels for, by its first number; the one that was made for them first.
_FOR_CARDS = {9: ("FA3", "FA4"), 10: ("FA4",)}
_LENGTHS = (
    1,
    65,
    130,
    300,
)  # tokens of documents that are compared: within a block of a kernel, at its edge, over several
_WINDOW = 48  # that a window is cut to, so that it hides something
# Part by which results may differ: in bfloat16 kernels round at other places. One that sees another token is off by tenths.
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Newer flash attention that is installed and not used."""

    name: str
    why: str


def switched_to() -> str | None:
    """Return what flash attention of this process is switched to, in small letters; None for torch's own."""
    name = attention.current_flash_attention_impl()
    return name and str(name).lower()


def switch_back() -> None:
    """Let flash attention be torch's own."""
    if attention.current_flash_attention_impl() is not None and _can_switch_back():
        attention.restore_flash_attention_impl()


def switch_flash(
    kernel: Varlen, asked: Collection[Asked], device: torch.device, *, recorded: str | None = None
) -> tuple[Refused, ...]:
    """Switch to the newest flash attention that does on ``device`` what ``kernel`` does with all that is ``asked``.

    Of a run that has ``recorded`` what computed its attention, that alone is switched to. Returns what was not taken though
    it is installed; what was taken, ``switched_to`` says.
    """
    switch_back()
    if not _can_switch_back():  # torch 2.10: what differed would stay
        return ()
    cut = {replace(one, window=one.window and min(one.window, _WINDOW)) for one in asked}
    known = attention.list_flash_attention_impls()
    names = [name for name in _FOR_CARDS.get(kernel.capability[0], ()) if name in known]
    if recorded is not None:
        names = [name for name in names if name.lower() in recorded.split()]
    refused = []
    for name in names:
        try:
            agrees = _agrees(name, kernel, cut, device)
        except ImportError:
            continue  # not installed
        except Exception as error:
            switch_back()
            if is_out_of_memory(error):
                raise
            refused.append(Refused(name=name, why=f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        if agrees:
            break
        switch_back()
        refused.append(Refused(name=name, why="its results differ from those of torch's own"))
    return tuple(refused)


def _can_switch_back() -> bool:
    return hasattr(attention, "restore_flash_attention_impl")  # torch 2.11 and later


def _agrees(name: str, kernel: Varlen, asked: Collection[Asked], device: torch.device) -> bool:
    """Switch to ``name``, and return whether results are what they were."""
    expected = [list(_results(kernel, one, device)) for one in asked]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch warns of each kernel that is replaced, which is what is asked for
        attention.activate_flash_attention_impl(name)
    return all(
        float((found - wanted).norm()) <= _TOLERANCE * float(wanted.norm())
        for one, results in zip(asked, expected, strict=True)
        for found, wanted in zip(_results(kernel, one, device), results, strict=True)
    )


def _results(kernel: Varlen, asked: Asked, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield what attention makes of random documents, and its gradients, all float32: of a row of them, and of the row as one."""
    generator = torch.Generator().manual_seed(0)  # training draws from the global one
    total = sum(_LENGTHS)

    def drawn(heads: int) -> torch.Tensor:
        numbers = torch.randn(1, heads, total, asked.head_dim, generator=generator)
        return numbers.to(device, asked.dtype).requires_grad_()

    parts = (drawn(asked.heads), drawn(asked.key_heads), drawn(asked.key_heads))
    gradient = drawn(asked.heads).detach().transpose(1, 2)
    bounds = torch.tensor([0, *accumulate(_LENGTHS)], dtype=torch.int32, device=device)
    made = kernel.attend(*parts, bounds=bounds, longest=max(_LENGTHS), asked=asked)
    yield from (part.float() for part in (made.detach(), *torch.autograd.grad(made, parts, gradient)))
    query, key, value = (part.repeat_interleave(asked.heads // part.shape[1], dim=1) for part in parts)
    whole = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=asked.scale)
    whole = whole.transpose(1, 2)
    yield from (part.float() for part in (whole.detach(), *torch.autograd.grad(whole, parts, gradient)))
