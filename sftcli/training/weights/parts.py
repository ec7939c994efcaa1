"""The shards of a model whose weights are elsewhere, as in its files: each process reads the rows that it keeps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from sftcli.runtime import is_finite, replace_parameters
from sftcli.training.distributed.group import Group
from sftcli.training.weights.masters import beyond_float16, is_exact
from sftcli.training.weights.placement import local_part, rows_of


class Numbers(Protocol):
    """Those of a weight, wherever they are."""

    def whole(self) -> torch.Tensor:
        """Return all of them."""

    def pieces(self, begin: int, end: int) -> Iterable[tuple[int, torch.Tensor]]:
        """Return rows ``begin`` to ``end`` in pieces, each with the number of its first row."""


class WeightsElsewhere(Protocol):
    """The weights of a model that has stand-ins for them."""

    @property
    def tensors(self) -> Mapping[nn.Parameter, Numbers]:
        """The numbers of each stand-in."""

    def spoilt(
        self,
        is_spoilt: Callable[[torch.Tensor], bool],
        together: Group,
        *,
        among: Sequence[nn.Parameter] | None = None,
    ) -> frozenset[nn.Parameter]:
        """Return those (``among`` some) with a piece that ``is_spoilt``, in all processes the same; all must call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """A weight that is elsewhere, and what its rounding loses."""

    tensor: Numbers
    is_rounded: bool  # it does not train, and products have something else
    fits_half: bool  # float16 loses nothing of it

    def exact(self) -> torch.Tensor:
        """Return what a checkpoint holds of it; without a copy where it is in that type."""
        return self.tensor.whole().half() if self.fits_half else self.tensor.whole()


def take_out(
    model: nn.Module,
    files: WeightsElsewhere,
    *,
    compute_dtype: torch.dtype,
    group: Group,
    writes_frozen: bool,
) -> dict[str, Outside]:
    """Put weights without numbers in the place of those in ``files``, as they will train or compute; return these by name.

    Args:
        model: As it was loaded.
        files: What has its weights.
        compute_dtype: Of matrix products.
        group: The processes; all must call it.
        writes_frozen: Find out what rounding loses of weights that do not train.

    Raises:
        UsageError: One has numbers that float16 has not.
    """
    named = {name: one for name, one in model.named_parameters() if one in files.tensors}
    if compute_dtype == torch.float16:
        beyond = files.spoilt(lambda piece: not is_finite(piece.half()), group)
        if first := next((name for name, one in named.items() if one in beyond), ""):
            raise beyond_float16(first)
    frozen = [one for one in named.values() if writes_frozen and not one.requires_grad]
    rounded, beyond_half = (
        files.spoilt(_loses(dtype), group, among=frozen) for dtype in (compute_dtype, torch.float16)
    )
    fresh = {one: _empty(one, compute_dtype) for one in named.values()}
    replace_parameters(model, fresh)
    return {
        name: Outside(tensor=files.tensors[one], is_rounded=one in rounded, fits_half=one not in beyond_half)
        for name, one in named.items()
    }


@torch.no_grad()
def read_shards(model: nn.Module, outside: Mapping[str, Outside], device: torch.device) -> None:
    """Give ``model``, which is shared out, its rows of the weights that it has no numbers of."""
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if name in outside:
            made = torch.empty_like(parameter, device=device)
            begin, end = rows_of(parameter)
            for start, piece in outside[name].tensor.pieces(begin, end):
                local_part(made)[start - begin :][: len(piece)].copy_(piece)
            fresh[parameter] = nn.Parameter(made, parameter.requires_grad)
    replace_parameters(model, fresh)


def _loses(dtype: torch.dtype) -> Callable[[torch.Tensor], bool]:
    return lambda piece: not is_exact(piece.to(dtype), piece)


def _empty(parameter: nn.Parameter, compute_dtype: torch.dtype) -> nn.Parameter:
    dtype = torch.float32 if parameter.requires_grad else compute_dtype
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), parameter.requires_grad)
