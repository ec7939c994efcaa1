"""Muon for the matrices between a model's layers, and AdamW for all else."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

MOMENTUM = 0.95  # with Nesterov's step, as its author has it (Jordan 2024)


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
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, object]],
        others: Sequence[dict[str, object]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> None:
        made: list[torch.optim.Optimizer] = []
        if matrices:
            made.append(
                torch.optim.Muon(
                    matrices, lr=learning_rate, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
                )
            )
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
