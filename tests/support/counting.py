"""Counts what goes through torch.distributed."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from sftcli.training.distributed.traffic import Traffic

_COUNTED = {  # operation -> whether the tensor that is whole is its first argument
    "_allgather_base_": ("gathered", 0),
    "_reduce_scatter_base_": ("scattered", 1),
    "allreduce_": ("summed", 0),
}


class TrafficCounter(TorchDispatchMode):
    """Sums the sizes of the tensors of collectives inside the block, the sums of a step, up to three numbers, left out."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    @property
    def traffic(self) -> Traffic:
        return Traffic(**self.bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind, place = _COUNTED.get(func.overloadpacket.__name__, (None, 0))
        if kind is not None:
            tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            self.bytes[kind] += sum(tensor.nbytes for tensor in tensors if tensor.numel() > 3)
        return func(*args, **(kwargs or {}))
