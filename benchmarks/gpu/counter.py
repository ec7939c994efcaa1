"""Counts what a step asks of a device, on tensors of the device ``meta``, which have shapes and no numbers.

What runs is the training itself; only the numbers that it reads are made up. An operation counts as one kernel, one on a list of
tensors as the launches that the list takes; the largest products and some reductions really launch two or three.
"""

import math
import sys
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_DEVICE = "meta"
_RANDOM = {"uniform_", "normal_", "random_", "trunc_normal_", "bernoulli_", "exponential_"}
_VIEWS = {
    "_unsafe_view",
    "lift_fresh",
    "_reshape_alias",
    "numpy_T",
}  # that do not say of themselves that they are
_UNREAD = {
    "copy_",
    "fill_",
    "zero_",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
}
_LOOK_UPS = {"embedding", "index", "index_select", "gather"}
_ATTENTION = ("_varlen_attn", "_scaled_dot_product")
_IN_PLACE = {"addmm_": torch.ops.aten.addmm}  # products that torch does not count by this name
_READERS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
# Of lists of tensors, a launch takes so many in 1, 2, ... of them together, and so many blocks of 65536 numbers.
_LIST_TENSORS, _LIST_BLOCKS, _BLOCK = (110, 64, 48, 36, 30), 320, 65536


@dataclass(slots=True)
class Counts:
    """What was asked of the device: by the name of an operation, or by the place in the program."""

    kernels: Tally[str] = field(default_factory=Tally)
    bytes: Tally[str] = field(default_factory=Tally)  # read and written, products and attention aside
    product_bytes: int = 0
    flops: int = 0
    waits: Tally[str] = field(default_factory=Tally)  # the program reads a number of the device
    uploads: Tally[str] = field(default_factory=Tally)  # copies to the device
    largest: Tally[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=Tally)  # results by shape

    @property
    def total(self) -> int:
        """Kernels in all."""
        return sum(self.kernels.values())

    @property
    def other_bytes(self) -> int:
        """Bytes that are read and written beside products and attention."""
        return sum(self.bytes.values())


class DeviceCounter(TorchDispatchMode):
    """Counts in ``counts`` what runs on ``meta`` inside the block.

    Numbers that are read are 1, or true. ``selected`` is how many positions a mask is taken to pick.
    """

    def __init__(self, *, selected: int = 1) -> None:
        super().__init__()
        self.selected = selected
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        if name in _RANDOM:
            return args[0]
        read = self._read(name, args, kwargs)
        if read is not None:
            self.counts.waits[_place()] += 1
            return read
        if name == "index" and any(_is_mask(part) for part in args[1]):
            self.counts.waits[_place()] += 1
            args = self._without_mask(args)
        elif name in ("index_put", "index_put_", "_index_put_impl_") and any(map(_is_mask, args[1])):
            self.counts.waits[_place()] += 1
        if _names_dtype(func):  # of products, which have no form for this device
            made = kwargs["out"] if "out" in kwargs else _product(args)
        else:
            made = func(*args, **kwargs)
        self._add(func, name, args, kwargs, made)
        return made

    def _read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the program is told where it reads the device; None where it does not."""
        tensors = [part for part in tree_leaves(args) if isinstance(part, torch.Tensor)]
        if not tensors or not any(part.device.type == _DEVICE for part in tensors):
            return None
        if name == "_local_scalar_dense":
            return (
                True if tensors[0].dtype is torch.bool else (tensors[0].dtype.is_floating_point and 1.0) or 1
            )
        if name in ("equal", "is_nonzero"):
            return True
        if name in _READERS:
            return torch.empty(self.selected, tensors[0].ndim, dtype=torch.int64, device=_DEVICE)
        if name == "_to_copy" and _is_host(kwargs.get("device")):
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name == "copy_" and tensors[0].device.type != _DEVICE:
            return tensors[0]
        return None

    def _without_mask(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = next(part for part in args[1] if _is_mask(part))
        places = torch.zeros(self.selected, dtype=torch.int64, device=_DEVICE)
        return (args[0].flatten(0, mask.ndim - 1), [places])

    def _add(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        results = _on_device(made)
        inputs = _on_device((args[:1] if name == "one_kernel" else args, kwargs))
        if not results and not inputs:
            return
        if (name in ("copy_", "_to_copy")) and any(
            part.device.type != _DEVICE for part in tree_leaves(args) if isinstance(part, torch.Tensor)
        ):
            self.counts.uploads[_place()] += 1
            if not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2])):
                self.counts.waits[_place() + " (upload)"] += 1
            return
        if func.is_view or name in _VIEWS or "empty" in name:
            return
        self.counts.kernels[name] += _launches(name, args)
        for part in results:
            self.counts.largest[(tuple(part.shape), part.dtype)] += 1
        moved = _moved(name, inputs, results, kwargs.get("out"))
        product = _IN_PLACE.get(name, func._overloadpacket)
        if product in flop_registry:
            shapes = args[:-1] if _names_dtype(func) else args
            self.counts.flops += flop_registry[product](*shapes, **kwargs, out_val=made)
        if product in flop_registry or name.startswith(_ATTENTION):
            self.counts.product_bytes += moved
        else:
            self.counts.bytes[name] += moved


def _names_dtype(func: Any) -> bool:
    """Return whether the last argument of a product is the dtype of its result."""
    return func._overloadname.startswith("dtype") and not func.is_view


def _product(args: tuple[Any, ...]) -> torch.Tensor:
    *_, left, right, dtype = args
    return torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=_DEVICE)


def _on_device(parts: Any) -> list[torch.Tensor]:
    return [
        part for part in tree_leaves(parts) if isinstance(part, torch.Tensor) and part.device.type == _DEVICE
    ]


def _is_mask(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.dtype is torch.bool and part.device.type == _DEVICE


def _is_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _size(tensor: torch.Tensor) -> int:
    """Return how many bytes are read of ``tensor``: one that is expanded is smaller than its shape."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _moved(name: str, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor], out: Any) -> int:
    written = sum(map(_size, results))
    if name in _LOOK_UPS:
        return 2 * written
    unread = {id(part) for part in tree_leaves(out)} | (
        {id(part) for part in inputs[:1]} if name in _UNREAD else set()
    )
    if name.startswith(("_foreach", "_fused_adam")) and not results:  # in place: the first list is written
        written = sum(map(_size, inputs)) // 2
    return written + sum(_size(part) for part in inputs if id(part) not in unread)


def _launches(name: str, args: tuple[Any, ...]) -> int:
    if not name.startswith(("_foreach", "_fused_adam")):
        return 1
    lists = [
        part
        for part in args
        if isinstance(part, (list, tuple)) and part and isinstance(part[0], torch.Tensor)
    ]
    most = _LIST_TENSORS[min(len(lists), len(_LIST_TENSORS)) - 1]
    blocks = sum(math.ceil(part.numel() / _BLOCK) for part in lists[0])
    return max(math.ceil(len(lists[0]) / most), math.ceil(blocks / _LIST_BLOCKS))


def _place() -> str:
    """Return the innermost place of this program that asked; of a library where this one did not."""
    frames = list(_frames())
    own = [frame for frame in frames if "/sftcli/" in frame[0]]
    path, line, function = (
        own or [frame for frame in frames if "/torch/" not in frame[0]] or [("backward", 0, "")]
    )[0]
    for root in ("/sftcli/", "/site-packages/"):
        if root in path:
            path = (
                root.strip("/").replace("site-packages", "")
                + "/" * (root == "/sftcli/")
                + path.rpartition(root)[2]
            )
    return f"{path}:{line} {function}"


def _frames() -> Iterator[tuple[str, int, str]]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
