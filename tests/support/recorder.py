"""A stand-in for CUDA graphs on a CPU: it repeats operations on the very tensors that they were recorded with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh"}


@dataclass(frozen=True, slots=True)
class _Launch:
    """An operation with what it read and what it made."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[torch.Tensor]


class Recording(TorchDispatchMode):
    """Keeps what runs in the block; what would wait for a device, or send it something, is refused as a capture refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[_Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        if name in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        made = func(*args, **kwargs)
        there = {_home(part) for part in _tensors((args, kwargs))}
        fresh = [part for part in _tensors(made) if _home(part) not in there]
        if fresh or func._schema.is_mutable:
            self.launches.append(_Launch(func, args, kwargs, fresh))
        return made

    def replay(self) -> None:
        """Run all again; new tensors are written over those that were made first."""
        for launch in self.launches:
            again = launch.func(*launch.args, **launch.kwargs)
            if launch.made:
                for old, new in zip(launch.made, _tensors(again), strict=True):
                    old.copy_(new)


class ReplayingRecorder:
    """Counts recordings and replays; with ``fails_from`` every recording from that number on fails."""

    def __init__(self, *, fails_from: int = 10**9) -> None:
        self.fails_from = fails_from
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record ``work``, run once before as on CUDA, where recording runs nothing: its results are spoilt."""
        if self.recorded >= self.fails_from:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        work()
        with Recording() as recording:
            result = work()
        for launch in recording.launches:
            for part in launch.made:
                if part.is_floating_point():
                    part.fill_(torch.nan)

        def replay() -> torch.Tensor:
            self.replayed += 1
            recording.replay()
            return result

        return replay


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [part for part in tree_leaves(tree) if isinstance(part, torch.Tensor)]


def _home(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
