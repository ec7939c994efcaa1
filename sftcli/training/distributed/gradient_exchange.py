"""Sums of gradients over processes that hold the same weights, while the backward pass that makes them still runs."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sftcli.training.distributed.group import Group

BUCKET_NUMBERS = 2**22  # that travel together; a larger tensor travels by itself


class GradientExchange:
    """The exchange of one step after another, in buckets of an order that is the same in every process.

    A bucket is sent once its gradients and all buckets before it are there. So a process whose passes make them in another
    order, or not at all, sends late and never something else. A gradient becomes a view of its bucket: there are no copies.

    Args:
        masters: The weights that train, in the same order in every process, those that a forward pass reads first in front.
        group: The processes; more than one.
    """

    def __init__(self, masters: Iterable[Parameter], group: Group) -> None:
        self._group = group
        self._buckets = list(
            _buckets([*masters][::-1])
        )  # a backward pass ends with what the forward pass began with
        self._place = {master: place for place, bucket in enumerate(self._buckets) for master in bucket}
        self._heard: set[Parameter] | None = None  # in the last pass; None while gradients may still grow
        self._missing: list[int] = []
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self.is_open = False  # whether a step has begun to make gradients and not ended

    def begin(self) -> None:
        """Begin a step."""
        self.is_open = True

    def listen(self) -> None:
        """Begin to send: the pass that follows is the last one of the step."""
        self._heard = set()
        self._missing = [len(bucket) for bucket in self._buckets]

    def hear(self, master: Parameter) -> None:
        """Note that the gradient of ``master`` in the current pass is there, and send what has become complete."""
        if self._heard is None:
            return
        if master in self._heard:
            raise RuntimeError(
                "a gradient grew after it was sent: its weight takes part in two backward passes at once"
            )
        self._heard.add(master)
        self._missing[self._place[master]] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(self._buckets[len(self._sent)])

    def send_rest(self) -> None:
        """Send all that the step has not sent yet, zeros for gradients that this process has not made."""
        self._heard = None
        for bucket in self._buckets[len(self._sent) :]:
            self._send(bucket)

    def finish(self) -> None:
        """Wait until each gradient is the sum over all processes."""
        sent, self._sent = self._sent, []
        for work, _ in sent:
            work.wait()
        self.is_open = False

    def give_up(self) -> None:
        """Let the others finish the exchange of a step that is taken again; gradients are of no use then."""
        if self.is_open:
            self.send_rest()
            self.finish()

    @torch.no_grad()
    def _send(self, bucket: Sequence[Parameter]) -> None:
        if len(bucket) == 1 and bucket[0].grad is not None:
            flat = bucket[0].grad.reshape(-1)
        else:
            flat = torch.cat([_gradient(master).reshape(-1) for master in bucket])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((work, flat))
        self._group.exchanged_bytes += flat.nbytes
        for master, part in zip(bucket, flat.split([master.numel() for master in bucket]), strict=True):
            master.grad = part.view_as(master)


def _gradient(master: Parameter) -> Tensor:
    return torch.zeros_like(master, dtype=torch.float32) if master.grad is None else master.grad


def _buckets(masters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    bucket: list[Parameter] = []
    size = 0
    for master in masters:
        if bucket and size + master.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, size = [], 0
        bucket.append(master)
        size += master.numel()
    if bucket:
        yield bucket
