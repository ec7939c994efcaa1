"""Adafactor (Shazeer and Stern 2018), of masters that may be sharded: means of rows and columns in the place of second moments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sftcli.training.distributed.shard_group import ShardGroup
from sftcli.training.weights.placement import local_part, zeros_by_rows

_DECAY = -0.8  # of 1 minus the weight that the means of earlier steps have, as a power of the step
_LEAST = 1e-30  # is added to squares
_LARGEST_RMS = 1.0  # of an update, before the learning rate


class Adafactor(torch.optim.Optimizer):
    """Adafactor without first moment, with an absolute learning rate. A step uses the gradients up: they become updates.

    Of matrices that are shared out the means of rows are where the rows are, and those of columns in every process; experts in one
    tensor are matrices of their own, each in one process.

    Args:
        groups: As for ``torch.optim.AdamW``.
        learning_rate: The first one.
        shard_group: The processes among which masters are shared out, where they are.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, learning_rate: float, shard_group: ShardGroup | None
    ) -> None:
        super().__init__(groups, {"lr": learning_rate})
        self._shard_group = shard_group

    def first_state(self, master: torch.Tensor) -> dict[str, Any]:
        """Return the state before the first step: means of squares, by row and by column; of vectors the squares themselves."""
        shape = tuple(master.shape)
        if len(shape) < 2:
            return {"step": 0, "exp_avg_sq": zeros_by_rows(shape, like=master, dtype=torch.float32)}
        columns = (*shape[:-2], shape[-1])
        return {
            "step": 0,
            "exp_avg_sq_row": zeros_by_rows(shape[:-1], like=master, dtype=torch.float32),
            "exp_avg_sq_col": zeros_by_rows(columns, like=master, dtype=torch.float32)
            if len(shape) > 2
            else torch.zeros(columns, device=master.device),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update each master that has a gradient."""
        assert closure is None
        updates = []
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    state = self.state[master]
                    if not state:
                        state.update(self.first_state(master))
                    state["step"] += 1
                    updates.append(_Update.of(master, state, group))
        if updates:
            self._take(updates)

    def _take(self, updates: Sequence["_Update"]) -> None:
        factored = [update for update in updates if update.is_factored]
        sums = [update.follow_rows() for update in factored]
        self._sum([one for one, update in zip(sums, factored, strict=True) if update.is_matrix])
        for update, of_columns in zip(factored, sums, strict=True):
            update.follow_columns(of_columns)
        for update in updates:
            if not update.is_factored:
                update.follow_squares()
        for update, norm in zip(updates, self._norms(updates), strict=True):
            update.apply(norm)

    def _norms(self, updates: Sequence["_Update"]) -> torch.Tensor:
        norms = torch.stack([update.gradient.norm(2) for update in updates])
        if self._shard_group is None:
            return norms
        return self._shard_group.sum(norms.square()).sqrt()

    def _sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make ``tensors`` their sums over the processes, which exchange them together."""
        if self._shard_group is None or not tensors:
            return
        summed = self._shard_group.sum(torch.cat(list(tensors)))
        for tensor, part in zip(tensors, summed.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.copy_(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """The update of those rows of a master that this process has; the ``gradient`` becomes it."""

    weights: torch.Tensor
    gradient: torch.Tensor
    shape: torch.Size  # of all rows
    state: Mapping[str, Any]
    group: Mapping[str, Any]

    @classmethod
    def of(cls, master: torch.nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any]) -> "_Update":
        assert master.grad is not None
        return cls(
            weights=local_part(master),
            gradient=local_part(master.grad),
            shape=master.shape,
            state=state,
            group=group,
        )

    @property
    def is_factored(self) -> bool:
        return len(self.shape) >= 2

    @property
    def is_matrix(self) -> bool:
        """Whether its columns reach over all processes."""
        return len(self.shape) == 2

    def follow_rows(self) -> torch.Tensor:
        """Move the means of rows; return the sums of squares in each column and, in one more, the sum of the means of rows."""
        squares, rows = self._squares(), local_part(self.state["exp_avg_sq_row"])
        self._move(rows, squares.mean(-1))
        return torch.cat((squares.sum(-2), rows.sum(-1, keepdim=True)), dim=-1)

    def follow_columns(self, sums: torch.Tensor) -> None:
        """Move the means of columns by ``sums`` of all rows, as ``follow_rows`` has them, and scale the gradient."""
        rows, columns = (local_part(self.state[f"exp_avg_sq_{name}"]) for name in ("row", "col"))
        means = sums / self.shape[-2]
        self._move(columns, means[..., :-1])
        of_rows = (rows / means[..., -1:]).rsqrt_().unsqueeze(-1)
        self.gradient.mul_(of_rows * columns.rsqrt().unsqueeze(-2))

    def follow_squares(self) -> None:
        """Move the means of each number, and scale the gradient."""
        means = local_part(self.state["exp_avg_sq"])
        self._move(means, self._squares())
        self.gradient.mul_(means.rsqrt())

    def apply(self, norm: torch.Tensor) -> None:
        """Update the weights; ``norm`` is that of the whole scaled gradient."""
        rate = self.group["lr"]
        rms = norm / self.shape.numel() ** 0.5
        self.gradient.div_((rms / _LARGEST_RMS).clamp_(min=1.0)).mul_(rate)
        if self.group["weight_decay"]:
            self.weights.add_(self.weights, alpha=-self.group["weight_decay"] * rate)
        self.weights.sub_(self.gradient)

    def _squares(self) -> torch.Tensor:
        return self.gradient.square().add_(_LEAST)

    def _move(self, means: torch.Tensor, found: torch.Tensor) -> None:
        kept = 1.0 - self.state["step"] ** _DECAY
        means.mul_(kept).add_(found, alpha=1.0 - kept)
