"""What ``torch.autograd.Function`` is called with, and hands to its two methods, with types that torch's own stub lacks."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Context(Protocol):
    """What ``forward`` keeps for ``backward``; a function with values of its own to keep adds them in a subclass."""

    saved_tensors: "tuple[torch.Tensor, ...]"  # None where None was saved
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: "torch.Tensor | None") -> None:
        """Keep tensors of the inputs and outputs."""


def applied(function: "type[torch.autograd.Function]", *arguments: object) -> "torch.Tensor":
    """Return what ``function``, which has one result, makes of ``arguments``."""
    result: torch.Tensor = function.apply(*arguments)
    return result
