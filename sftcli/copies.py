"""Copies between the host and a device that neither of them waits for."""

from collections.abc import Iterable

import torch

from sftcli.runtime import free_memory_bytes


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``tensor`` on ``device``. To CUDA it goes by pinned memory, as a copy from other memory makes the host wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Reading:
    """Numbers of a device on their way to the host, as they are now.

    Reading them waits for what was launched before, and not for what was launched since.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers
        self._is_there: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def numbers(self) -> torch.Tensor:
        """Return them in the host's memory."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._numbers.cpu()


class HostCopies:
    """Copies of tensors in the host's memory, which are there as soon as they are asked for.

    Call ``hold`` before the tensors are changed in place, and ``wait`` before their copies are read.
    """

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copy of ``tensor``."""
        return tensor.to("cpu", copy=True)

    def hold(self) -> None:
        """Let what is launched from here on begin after the copies are made; the host does not wait."""

    def wait(self) -> None:
        """Wait until the copies are made."""


class CopiesBeside(HostCopies):
    """Copies that CUDA makes beside its work, into pinned memory: from other memory it would be several times slower."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copy of ``tensor``; one that is on the host is there at once."""
        if not tensor.is_cuda:
            return super().copy(tensor)
        target = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            target.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return target

    def hold(self) -> None:
        """Let the stream that computes wait for the copies."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        """Wait until the copies are made, in any thread."""
        self._stream.synchronize()


def host_copies(device: torch.device, tensors: Iterable[torch.Tensor]) -> HostCopies:
    """Return what copies ``tensors`` to the host, beside the work of CUDA where there is memory to pin.

    Pinned memory cannot be swapped out, and torch takes blocks of up to twice the size.
    """
    if device.type == "cuda" and 2 * sum(tensor.nbytes for tensor in tensors) <= free_memory_bytes():
        return CopiesBeside(device)
    return HostCopies()
