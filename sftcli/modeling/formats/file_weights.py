"""Weights of a model that stay in its files until they are needed: those of a layer while it computes, rows of a process for good."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from sftcli.modeling.formats.converted import Recipe, recipes
from sftcli.modeling.formats.source_tensors import SourceTensors
from sftcli.modeling.formats.stored_tensors import FLOATS, StoredTensor, view_of
from sftcli.runtime import replace_parameters, share_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIECE_NUMBERS = 1 << 22  # converted at once


class Together(Protocol):
    """The processes that share a model out, as far as reading it needs them."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """How many they are."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor(ABC):
    """The numbers of a weight in files; its shape, and the type that the model has them in."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def raw(self) -> torch.Tensor:
        """Return all of them, in whatever type; where a file holds them so, as a view of it."""

    def whole(self) -> torch.Tensor:
        """Return all of them; where a file holds them so, as a view of it."""
        return self.raw().to(self.dtype)

    def share(self, together: Together) -> tuple[int, int]:
        """Return which rows are those of this process: first one, and the one behind the last."""
        return share_of(self.shape[0], together.rank, together.size)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield rows ``begin`` to ``end`` in pieces of a few MB, each with the number of its first row."""
        if begin == end:
            return
        rows = self.raw()
        each = max(1, _PIECE_NUMBERS // max(1, rows[:1].numel()))
        for start in range(begin, end, each):
            yield start, rows[start : min(start + each, end)].to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTensor(FileTensor):
    """One that a file holds as it is."""

    stored: StoredTensor

    def raw(self) -> torch.Tensor:
        """Return a view of the file."""
        return view_of(self.stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTensor(FileTensor):
    """One that is put together from others; whoever wants a part of it makes the whole."""

    recipe: Recipe
    name: str

    def raw(self) -> torch.Tensor:
        """Put it together."""
        return self.recipe.made()[self.name]


class WholeOnlyError(Exception):
    """A model cannot stay in its files, and why."""


class FileWeights:
    """The parameters of a model that are in its files; the model has stand-ins for them, which are NaN all over.

    Args:
        model: Its parameters are replaced.
        tensors: Where the numbers of each are.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[nn.Parameter, FileTensor]) -> None:
        fresh = {
            parameter: nn.Parameter(_stand_in(parameter.shape, tensor.dtype), parameter.requires_grad)
            for parameter, tensor in tensors.items()
        }
        replace_parameters(model, fresh)
        self.tensors = {fresh[parameter]: tensor for parameter, tensor in tensors.items()}
        self._held: list[nn.Parameter] = []  # by the layer that computes

    def hold(self, module: nn.Module) -> None:
        """Give ``module`` its numbers, and take those of the module before from it."""
        wanted = [one for one in module.parameters() if one in self.tensors]
        if any(map(_is_stand_in, wanted)):  # else it is a part of what is held
            self._release(one for one in self._held if one not in {*wanted})
            self._held = [*(one for one in self._held if one in {*wanted}), *self._take(wanted)]

    @contextmanager
    def streamed(
        self, model: nn.Module, layers: Sequence[nn.Module]
    ) -> Iterator[Callable[[nn.Module], None]]:
        """Let ``model`` compute as if it was in memory: one of ``layers`` at a time is, and all that is in none of them.

        Yields ``hold``, for what reads the weights of a layer otherwise than in a pass. What backward passes would need is
        not kept.
        """
        inner = {id(part) for layer in layers for part in layer.modules()}
        outer = [part for part in model.modules() if id(part) not in inner]
        root = self._take([one for part in outer for one in part.parameters(recurse=False)])
        handles = [layer.register_forward_pre_hook(lambda layer, _: self.hold(layer)) for layer in layers]
        try:
            yield self.hold
        finally:
            for handle in handles:
                handle.remove()
            self._release([*self._held, *root])
            self._held = []

    def spoilt(
        self,
        is_spoilt: Callable[[torch.Tensor], bool],
        together: Together,
        *,
        among: Sequence[nn.Parameter] | None = None,
    ) -> frozenset[nn.Parameter]:
        """Return those (``among`` some) with a piece that ``is_spoilt``: each process looks at its rows, and all get the same."""
        asked = [*self.tensors] if among is None else among
        tensors = [self.tensors[one] for one in asked]
        flags = [
            float(any(is_spoilt(piece) for _, piece in one.pieces(*one.share(together)))) for one in tensors
        ]
        return frozenset(one for one, flag in zip(asked, together.sum(flags), strict=True) if flag)

    def _take(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of ``parameters`` that had no numbers; now they have."""
        missing = (one for one in parameters if one in self.tensors and _is_stand_in(one))
        taken = [*dict.fromkeys(missing)]  # a tied one comes twice
        for one in taken:
            one.data = self.tensors[one].whole()
        return taken

    def _release(self, parameters: Iterable[nn.Parameter]) -> None:
        for one in parameters:
            storage, one.data = one.data.untyped_storage(), _stand_in(one.shape, one.dtype)
            if storage.resizable():  # else it is a view of a file
                storage.resize_(0)  # what a pass has saved for a backward pass would keep it


def leave_in_files(model: "PreTrainedModel", folder: Path) -> FileWeights:
    """Return the weights of ``model``, which was built on the meta device from ``folder``; its buffers become real.

    Raises:
        WholeOnlyError: Its weights are other than what the files hold.
    """
    source = SourceTensors.of(model, folder)
    _refuse_strange(source)
    stored = {
        place.name: source.stored[name] for name, place in source.places.items() if not place.is_converted
    }
    made = recipes(model, source)
    named: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(parameter, []).append(name)
    tensors: dict[nn.Parameter, FileTensor] = {}
    for parameter, names in named.items():
        found = [name for name in names if name in stored or name in made]
        if len(found) != 1 or _has_twin(model, found[0], stored):
            raise WholeOnlyError(f"its files hold {names[0]} under several names")
        name, shape, dtype = found[0], tuple(parameter.shape), parameter.dtype
        tensors[parameter] = (
            PlainTensor(stored=stored[name], shape=shape, dtype=dtype)
            if name in stored
            else ConvertedTensor(recipe=made[name], name=name, shape=shape, dtype=dtype)
        )
    compute_buffers(model)
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(view_of(stored[name]))
    return FileWeights(model, tensors)


def _refuse_strange(source: SourceTensors) -> None:
    for name in source.places:
        stored = source.stored[name]
        if stored.dtype not in FLOATS or not all(stored.shape) or not stored.shape:
            raise WholeOnlyError(f"{name} is {stored.dtype} of the shape {stored.shape}")


def _has_twin(model: "PreTrainedModel", name: str, stored: Collection[str]) -> bool:
    """Return whether ``name`` is to be tied to another tensor that the files hold as well: whether it is, its numbers tell."""
    ties = model.all_tied_weights_keys
    return any(name in tie and tie[0] in stored and tie[1] in stored for tie in ties.items())


@torch.no_grad()
def compute_buffers(model: "PreTrainedModel") -> None:
    """Let the class of ``model``, which is on the meta device, compute the buffers that no file holds, as transformers does."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
                vars(module)["_is_hf_initialized"] = name not in module._non_persistent_buffers_set
    model.initialize_weights()


def _stand_in(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), math.nan, dtype=dtype).expand(shape)


def _is_stand_in(parameter: nn.Parameter) -> bool:
    return not any(parameter.stride())
