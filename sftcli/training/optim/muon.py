"""Muon for the matrices between a model's layers, and AdamW for all else."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sftcli.training.distributed.shard_group import ShardGroup
from sftcli.training.weights.placement import local_part

MOMENTUM = 0.95  # with Nesterov's step, as its author has it (Jordan 2024)
_MADE_IN = torch.bfloat16  # as torch's products make matrices orthogonal


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one: they share groups and state, and take their steps together.

    The steps of Muon are scaled to those that AdamW would take (``0.2 * sqrt(max(rows, columns))``, Liu et al. 2025), so both
    have the same learning rate and weight decay.

    Args:
        matrices: Groups of Muon, of matrices alone.
        others: Groups of AdamW.
        learning_rate: The first one.
        betas: Of AdamW.
        epsilon: Of AdamW.
        shard_group: The processes among which masters are shared out, where they are.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, object]],
        others: Sequence[dict[str, object]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        shard_group: ShardGroup | None,
    ) -> None:
        made: list[torch.optim.Optimizer] = []
        muon = torch.optim.Muon if shard_group is None else partial(ShardedMuon, shard_group=shard_group)
        if matrices:
            made.append(muon(matrices, lr=learning_rate, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"))
        if others:
            made.append(torch.optim.AdamW(others, lr=learning_rate, betas=betas, eps=epsilon, fused=True))
        groups = [group for optimizer in made for group in optimizer.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self._optimizers = made
        self.param_groups = groups  # the very ones of the two, so that a learning rate set here holds there
        self.state = defaultdict(dict)
        for optimizer in made:
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step of both."""
        assert closure is None
        for optimizer in self._optimizers:
            optimizer.step()


class ShardedMuon(torch.optim.Muon):
    """Muon of matrices that are shared out, with the numbers of torch's own.

    Momentum stays where the rows are. The update of a matrix has to be whole to be made orthogonal: each of the processes does so
    with one of as many matrices as there are processes, and gives the others their rows of it. So a process has one whole matrix
    beside its shards, and the products are divided among all.

    Args:
        groups: As for torch's.
        shard_group: The processes.
        options: As for torch's.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, object]],
        *,
        shard_group: ShardGroup,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(groups, **options)
        self._shard_group = shard_group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update each matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            masters = [master for master in group["params"] if master.grad is not None]
            for begin in range(0, len(masters), self._shard_group.size):
                self._update(masters[begin : begin + self._shard_group.size], group)

    def _update(self, masters: Sequence[torch.nn.Parameter], group: Mapping[str, Any]) -> None:
        # Torch's own, so that the numbers are those of one process. Private, so that only who shares weights out depends on them.
        from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

        orthogonal = partial(
            _zeropower_via_newtonschulz,
            ns_coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            eps=group["eps"],
        )
        followed = [self._follow(master, group["momentum"]) for master in masters]
        shapes = [master.shape for master in masters]
        turned = self._shard_group.change_whole(followed, shapes, orthogonal, dtype=_MADE_IN)
        for master, update in zip(masters, turned, strict=True):
            rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], master.shape)
            weights = local_part(master)
            weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _follow(self, master: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Move the momentum of ``master``; return Nesterov's step."""
        assert master.grad is not None
        state, gradient = self.state[master], local_part(master.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(master.grad)
        buffer = local_part(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
