"""Updates within the backward pass: each weight is updated as soon as its gradient is whole, and the gradient is freed.

All gradients together are never there. What has to be known of all of them before the first update is the norm that they are
clipped to, and whether they are finite. A step that clips therefore computes its pass twice: for the norm, then for the updates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sftcli.data.batches.batch import Batch
from sftcli.errors import DivergedError
from sftcli.training.optim.optimizer import clip_gradients
from sftcli.training.optim.update import Taken
from sftcli.training.weights.masters import MasterWeights


class GradientRelease:
    """The updates of steps that are one micro-batch; gradients of several would have to be summed, and are left alone.

    Args:
        weights: Of one process, which collect gradients at once.
        optimizer: Of their masters.
        max_norm: What gradients are clipped to; infinity where they are not.
    """

    def __init__(self, weights: MasterWeights, optimizer: torch.optim.Optimizer, *, max_norm: float) -> None:
        self._weights = weights
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._heard: Callable[[torch.nn.Parameter], None] = _keep
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._is_bad = False
        self.has_begun = False  # whether a weight of the step under way is updated: it cannot be taken again
        weights.tell_gradients(lambda master: self._heard(master))

    @property
    def computes_twice(self) -> bool:
        """Whether a pass is for the norm alone, and followed by another one."""
        return math.isfinite(self._max_norm)

    @contextmanager
    def listening(self, window: Sequence[Batch]) -> Iterator[None]:
        """Release the gradients of the block, the first pass of a step, if ``window`` is a single micro-batch."""
        self._norms, self._is_bad, self.has_begun = {}, False, False
        heard = self._measure if self.computes_twice else self._update
        with self._hearing(heard if self.is_for(window) else _keep):
            yield

    def is_for(self, window: Sequence[Batch]) -> bool:
        """Return whether the gradients of ``window`` are released."""
        return len(window) == 1

    def finish(self, sums: torch.Tensor, *, compute_again: Callable[[], object]) -> Taken:
        """End a step whose pass is over; ``compute_again`` computes it another time, from the same random numbers.

        Raises:
            DivergedError: A gradient was not finite when other weights were updated already.
        """
        norm = self._norm()
        minimized, nll, balance, grad_norm = torch.cat((sums, norm.reshape(1))).tolist()
        applied = math.isfinite(nll) and math.isfinite(grad_norm)
        if applied and self.computes_twice:
            with self._hearing(lambda master: self._update_clipped(master, norm, grad_norm)):
                compute_again()
        if not applied and self.has_begun:
            raise DivergedError(
                "gradients are not finite in a step that has updated some of the weights",
                hint="earlier checkpoints are intact; lower training.learning_rate, or clip: training.max_grad_norm=1, which "
                "knows before the first update",
            )
        return Taken(sums=(minimized, nll, balance), grad_norm=grad_norm, applied=applied)

    @contextmanager
    def _hearing(self, heard: Callable[[torch.nn.Parameter], None]) -> Iterator[None]:
        before, self._heard = self._heard, heard
        try:
            yield
        finally:
            self._heard = before

    def _norm(self) -> torch.Tensor:
        """Return the norm of all gradients, from those of each in the order of the masters: as ``gradient_norm`` has it."""
        found = [self._norms[master] for master in self._weights.masters.values() if master in self._norms]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(found))
        return norm

    @torch.no_grad()
    def _measure(self, master: torch.nn.Parameter) -> None:
        assert master.grad is not None
        (self._norms[master],) = torch._foreach_norm([master.grad])
        master.grad = None

    def _update(self, master: torch.nn.Parameter) -> None:
        gradient = master.grad
        self._measure(master)
        self._is_bad = self._is_bad or not self._norms[master].isfinite()
        if not self._is_bad:
            master.grad = gradient
            self._apply(master)

    def _update_clipped(self, master: torch.nn.Parameter, norm: torch.Tensor, grad_norm: float) -> None:
        if grad_norm > self._max_norm:
            clip_gradients([master], self._max_norm, norm)
        self._apply(master)

    @torch.no_grad()
    def _apply(self, master: torch.nn.Parameter) -> None:
        self.has_begun = True
        self._optimizer.step()  # no other one has a gradient
        master.grad = None
        self._weights.publish_one(master)


def _keep(_: torch.nn.Parameter) -> None:
    """Leave a gradient where it is, for the usual update."""
