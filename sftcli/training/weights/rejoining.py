"""What a pass over sharded weights exchanges, so that a process whose pass broke off can take part in the rest of it.

The others are inside the pass and wait for its shards, and a collective that has begun cannot be undone. What each pass exchanges,
and in which order, depends on the weights alone, so it is noted once, in a pass over a short row. A process that runs out of memory
gives zeros for all that its passes of the step had still to exchange. Then all agree to forget the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

_GATHER = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # the name in newer torch, and in older
_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A gather of weights or a scatter of gradients: how many numbers the ``whole`` has, and each process's ``part``."""

    is_scatter: bool
    whole: int
    part: int
    dtype: torch.dtype


class PassLog:
    """Notes the collectives of ``root``, of which ``shards`` processes hold a replica; others hold the same as they, ``replicas``."""

    def __init__(
        self,
        root: FSDPModule,
        *,
        shards: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._root = root
        self._shards = shards
        self._replicas = replicas
        self._device = device
        self._of_a_pass: Sequence[Collective] | None = None  # while it is not known, or was another one
        self._seen: list[Collective] = []
        for module in _sharded(root):
            module.set_custom_all_gather(cast("Any", _Gather(self._seen)))
            module.set_custom_reduce_scatter(cast("Any", _Scatter(self._seen)))

    @property
    def is_known(self) -> bool:
        """Whether a pass that broke off can be ended."""
        return self._of_a_pass is not None and hasattr(self._root, "reset_iter_state")  # older torch has none

    def begin(self) -> None:
        """Expect a pass."""
        self._seen.clear()

    def keep(self) -> None:
        """Take the pass that has ended, which exchanged gradients, for the one that all are like."""
        self._of_a_pass = tuple(self._seen)

    def end(self, *, exchanges: bool) -> None:
        """Make sure that the pass that has ended was like the one that is kept; ``exchanges`` gradients or not."""
        if self._of_a_pass is not None and self._seen != self._expected(exchanges=exchanges):
            self._of_a_pass = None

    def reset(self) -> None:
        """Bring the shards back to where they are between two steps, after an error inside a pass."""
        self._root.reset_iter_state()
        for module in _sharded(self._root):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for one in group.fsdp_params:
                    one.unsharded_accumulated_grad = None
                    if hasattr(one, "_unsharded_param"):
                        one.unsharded_param.grad = None

    def take_rest(self, *, exchanges: bool, sums: bool) -> None:
        """Take part in what the pass that began last has not exchanged; ``sums`` over replicas as well, or not."""
        for one in self._expected(exchanges=exchanges)[len(self._seen) :]:
            part, whole = (
                torch.zeros(size, dtype=one.dtype, device=self._device) for size in (one.part, one.whole)
            )
            if one.is_scatter:
                _SCATTER(part, whole, group=self._shards)
                if sums and self._replicas is not None:
                    dist.all_reduce(part, group=self._replicas)
            else:
                _GATHER(whole, part, group=self._shards)

    def _expected(self, *, exchanges: bool) -> list[Collective]:
        assert self._of_a_pass is not None
        return [one for one in self._of_a_pass if exchanges or not one.is_scatter]


class _Noted:
    """What torch asks for memory and to exchange."""

    def __init__(self, seen: list[Collective]) -> None:
        self._seen = seen

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def note(self, *, is_scatter: bool, whole: torch.Tensor, part: torch.Tensor) -> None:
        self._seen.append(
            Collective(is_scatter=is_scatter, whole=whole.numel(), part=part.numel(), dtype=part.dtype)
        )


class _Gather(_Noted):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        work: dist.Work | None = _GATHER(output_tensor, input_tensor, group=group, async_op=async_op)
        self.note(is_scatter=False, whole=output_tensor, part=input_tensor)
        return work


class _Scatter(_Noted):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,  # noqa: ANN401 - torch has no name for it
        async_op: bool = False,
    ) -> dist.Work | None:
        work: dist.Work | None = _SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        self.note(is_scatter=True, whole=input_tensor, part=output_tensor)
        return work


def _sharded(root: FSDPModule) -> list[FSDPModule]:
    assert isinstance(root, torch.nn.Module)
    return [module for module in root.modules() if isinstance(module, FSDPModule)]
