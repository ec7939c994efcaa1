"""Counts what goes through torch.distributed."""

from collections import Counter

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sftcli.training.distributed.traffic import Traffic

_COUNTED = {  # operation -> whether the tensor that is whole is its first argument
    "_allgather_base_": ("gathered", 0),
    "_reduce_scatter_base_": ("scattered", 1),
    "allreduce_": ("summed", 0),
}
_OF_UPDATES = {"allreduce_": ("updated", 0), "alltoall_base_": ("updated", 1)}


class TrafficCounter(TorchDispatchMode):
    """Sums the sizes of the tensors of collectives inside the block, the sums of a step, up to three numbers, left out.

    All that an optimizer exchanges is counted as that.
    """

    def __init__(self):
        super().__init__()
        self.bytes = Counter()
        self.updates = 0  # under way, one inside another
        self.hooks = []

    def __enter__(self):
        self.hooks = [
            register_optimizer_step_pre_hook(lambda *_: self.begin_update(1)),
            register_optimizer_step_post_hook(lambda *_: self.begin_update(-1)),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def begin_update(self, more):
        self.updates += more

    @property
    def traffic(self) -> Traffic:
        return Traffic(**self.bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of_update = self.updates > 0
        counted = _OF_UPDATES if of_update else _COUNTED
        kind, place = counted.get(func.overloadpacket.__name__, (None, 0))
        if kind is not None:
            tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            self.bytes[kind] += sum(tensor.nbytes for tensor in tensors if of_update or tensor.numel() > 3)
        return func(*args, **(kwargs or {}))
