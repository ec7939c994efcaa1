"""Whether what was written computes what its model does: logits with the numbers of one beside those of the other.

They are computed in float32, one layer's numbers at a time, so that this takes little memory beside the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How near the logits of a file are to its model's.

    ``distance`` is the median over the places of a text, as a part of the spread of the model's logits there: at few of them
    another expert may be chosen. ``limit`` is what the rounding of the file explains. ``same`` of the ``places`` have the same
    likeliest token.
    """

    distance: float
    limit: float
    same: int
    places: int

    @property
    def is_near(self) -> bool:
        """Whether the rounding of the file explains it; NaN is not near."""
        return self.distance <= self.limit

    def in_words(self) -> str:
        """Return it in a line."""
        return (
            f"logits differ by {self.distance:.2g} of their spread, up to {self.limit:.2g} is rounding; "
            f"the likeliest token is the same at {self.same} of {self.places} places"
        )


def agreement(ours: torch.Tensor, theirs: torch.Tensor, *, limit: float) -> Agreement:
    """Return how near ``theirs`` are to ``ours``, both (rows, places, tokens)."""
    spread = (ours - ours.mean(-1, keepdim=True)).norm(dim=-1)
    apart = (theirs - ours).norm(dim=-1) / spread
    same = ours.argmax(-1) == theirs.argmax(-1)
    return Agreement(distance=float(apart.median()), limit=limit, same=int(same.sum()), places=same.numel())


def own_numbers(_name: str, own: torch.Tensor) -> torch.Tensor:
    """Return the model's own numbers in float32."""
    return own.float()


@torch.no_grad()
def logits_with(model: "PreTrainedModel", ids: torch.Tensor, read: Read) -> torch.Tensor:
    """Return the logits of ``model`` with the numbers that ``read`` gives for the name and the own numbers of each weight."""
    with _numbers_of(model, read):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float()


@contextmanager
def _numbers_of(model: nn.Module, read: Read) -> Iterator[None]:
    """Let each layer have the numbers that ``read`` gives while it computes, and its own again behind that."""
    handles = [
        handle
        for name, layer in model.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
        for handle in _exchange(name, layer, read)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exchange(name: str, layer: nn.Module, read: Read) -> Sequence["torch.utils.hooks.RemovableHandle"]:
    own: dict[str, torch.Tensor] = {}

    def before(_layer: nn.Module, _inputs: object) -> None:
        for part, weight in layer.named_parameters(recurse=False):
            own[part] = weight.data
            weight.data = read(f"{name}.{part}", weight.data)

    def behind(_layer: nn.Module, _inputs: object, _output: object) -> None:
        for part, weight in layer.named_parameters(recurse=False):
            weight.data = own.pop(part)

    return layer.register_forward_pre_hook(before), layer.register_forward_hook(behind, always_call=True)
