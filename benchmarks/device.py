"""The device that training would use, for the benchmarks: its clock, its memory and its rate of products."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity

from sftcli.runtime import choose_device, held_peak_bytes, reset_peak_memory


def wait() -> None:
    """Wait until nothing is left to do on the device."""
    if choose_device().type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes, what it leaves to the device included."""
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def held_bytes() -> int:
    """Return the most memory held so far: on CUDA what is reserved there, else that of the process."""
    return held_peak_bytes(choose_device())


def begin_memory() -> None:
    """Let ``held_bytes`` begin again on CUDA, where set-up can take more than steps do; a process keeps what it took."""
    if choose_device().type == "cuda":
        torch.cuda.empty_cache()
        reset_peak_memory(choose_device())


def activities() -> list[ProfilerActivity]:
    """Return what a profile records: on CUDA its kernels too."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if choose_device().type == "cuda" else [])]


def rate_of(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return how many flop/s large products make in ``dtype``."""
    device = choose_device()
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> torch.Tensor:
        return left @ right

    each = seconds_of(product)
    if each < seconds:
        each = seconds_of(product)  # the first one sets up more than it multiplies
    count = round(seconds / each)
    if count < 2:
        return 2 * side**3 / each
    return 2 * side**3 * count / seconds_of(lambda: [product() for _ in range(count)])
