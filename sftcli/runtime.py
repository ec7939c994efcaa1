"""The machine: which device and precision to use, memory, random state. The only module that asks what hardware is there."""

import ctypes
import math
import mmap
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sftcli.errors import ResourceError

try:
    from resource import RLIM_INFINITY, RLIMIT_AS, RLIMIT_DATA, RUSAGE_SELF, getrlimit, getrusage

    HAS_USAGE = True
except ImportError:  # Windows
    HAS_USAGE = False

Clock = Callable[[], float]  # seconds; only differences mean something
monotonic: Clock = time.monotonic

_CPU_PROBES = (
    "_is_amx_tile_supported",
    "_is_avx512_bf16_supported",
)  # instruction sets with bfloat16 products
_CONTROL_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_DRIVER = Path("/proc/driver/nvidia/version")
_GLIBC = platform.libc_ver()[0] == "glibc"
_MATMUL_SECONDS = 0.04
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_CPU_SIDE = 1024  # of a matrix that is multiplied to measure a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSizes:
    """How much goes through a model at once, where results do not depend on it."""

    heldout_positions: int  # scored together
    decode_rows: int  # decoded together, if their keys and values fit
    prompt_tokens: int  # of prompts that are read together


_PASS_SIZES = {"cuda": PassSizes(heldout_positions=32_768, decode_rows=1024, prompt_tokens=16_384)}
# A pass over so many tokens of prompts takes about a second on a laptop.
_PASS_SIZES_ELSEWHERE = PassSizes(heldout_positions=4096, decode_rows=32, prompt_tokens=1024)


def pass_sizes(device: torch.device) -> PassSizes:
    """Return how much goes through a model on ``device`` at once."""
    return _PASS_SIZES.get(device.type, _PASS_SIZES_ELSEWHERE)


def choose_device() -> torch.device:
    """Return the accelerator that is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_bf16_products(device: torch.device) -> bool:
    """Return whether ``device`` has instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(getattr(torch.cpu, probe)() for probe in _CPU_PROBES if hasattr(torch.cpu, probe))
    return False


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return what a CUDA device can do, as NVIDIA counts it: (8, 0) is an A100, (9, 0) an H100."""
    return torch.cuda.get_device_capability(device)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for the setting ``precision``: auto, bf16, fp16 or fp32.

    Raises:
        ResourceError: bf16 was asked for on a CUDA device that cannot do it.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        if device.type == "cuda" and not has_bf16_products(device):
            raise ResourceError(
                f"{torch.cuda.get_device_name(device)} does not support bfloat16 matrix products",
                hint="pass --set training.precision=fp32",
            )
        return torch.bfloat16
    if precision == "fp16":
        return torch.float16
    if has_bf16_products(device):
        return torch.bfloat16
    return torch.float16 if has_fp16_units(device) else torch.float32


def has_fp16_units(device: torch.device) -> bool:
    """Return whether ``device`` has matrix units for float16: NVIDIA's from Volta on (V100, T4, RTX 20)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def gpu_facts(device: torch.device) -> dict[str, str]:
    """Return name, capability and memory of a CUDA device, and the versions of CUDA and of the driver; nothing of others."""
    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    facts = {
        "gpu": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "gpu memory": f"{total_memory_bytes(device) / 1e9:.1f} GB",
        "cuda": str(torch.version.cuda),
    }
    driver = _driver_version()
    return facts | {"driver": driver} if driver else facts


def _driver_version() -> str:
    """Return the version of NVIDIA's driver; "" where it cannot be told."""
    try:
        words = _DRIVER.read_text(encoding="utf-8", errors="replace").split()
    except OSError:  # not Linux
        return ""
    return next((word for word in words if word.replace(".", "").isdecimal() and "." in word), "")


def has_matrix_units() -> bool:
    """Return whether the CPU has units (AMX) that multiply bfloat16 matrices many times as fast as float32 ones."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    is_held_back = "ONEDNN_MAX_CPU_ISA" in os.environ or "ATEN_CPU_CAPABILITY" in os.environ
    return bool(probe and probe()) and not is_held_back


def processor() -> str:
    """Return what decides how fast this CPU multiplies: its model and instruction sets, threads, and the library."""
    try:
        lines = (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        )
    except OSError:  # not Linux
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "features")
    facts = [line for line in lines if line.partition(":")[0].strip().lower() in wanted]
    limits = [f"{name}={os.environ.get(name, '')}" for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    return "\n".join(
        [
            platform.machine(),
            platform.processor(),
            *facts,
            *limits,
            f"{torch.get_num_threads()} threads",
            torch.__version__,
        ]
    )


def products_seconds(dtype: torch.dtype) -> Callable[[], float]:
    """Return what multiplies two large matrices on the CPU and tells the processor time that this took.

    The time that other programs take counts little there.
    """
    generator = torch.Generator().manual_seed(0)  # training draws from the global one
    left, right = (torch.randn(_CPU_SIDE, _CPU_SIDE, generator=generator).to(dtype) for _ in range(2))
    _ = left @ right  # the first one sets up more than it multiplies

    def measure() -> float:
        begin = time.process_time()
        _ = left @ right
        return time.process_time() - begin

    return measure


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that ``dtype_name`` calls ``name``: bf16, fp16 or fp32.

    Raises:
        ResourceError: ``device`` cannot multiply in it.
    """
    return choose_dtype(name if name in _DTYPE_NAMES.values() else "fp32", device)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bf16", "fp16" or "fp32"."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How CUDA computes: by kernels that give the same bits each time, and with what rounding of float32 products.

    ``fills`` says whether each new tensor is filled first, beside such kernels: only who reads what nobody wrote would see it.
    """

    deterministic: bool
    tf32: bool
    tf32_convolutions: bool
    fills: bool = False


def used_kernels() -> Kernels:
    """Return how CUDA computes in this process now."""
    return Kernels(
        deterministic=torch.are_deterministic_algorithms_enabled(),
        tf32=torch.get_float32_matmul_precision() != "highest",
        tf32_convolutions=torch.backends.cudnn.allow_tf32,
        fills=torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def set_kernels(kernels: Kernels) -> None:
    """Let CUDA compute so from here on. Products of cuBLAS need a variable as well: ``environment.set_defaults``."""
    torch.use_deterministic_algorithms(kernels.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = kernels.fills  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high" if kernels.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = kernels.tf32_convolutions


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product, measured: the ceiling for training on ``device``.

    The best of some products counts, so that what else the machine does for a moment matters little.
    """
    side = _CPU_SIDE if device.type == "cpu" else 4096
    generator = torch.Generator().manual_seed(0)  # training draws from the global one
    left, right = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    (left @ right)[0, 0].item()  # the first one sets up more than it multiplies
    best, end = math.inf, monotonic() + _MATMUL_SECONDS
    while best == math.inf or monotonic() < end:
        begin = monotonic()
        (left @ right)[0, 0].item()  # waits for the device
        best = min(best, monotonic() - begin)
    return 2 * side**3 / best


def step_aside() -> None:
    """Let the calling thread have what processor time the others leave, where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: the device's on CUDA, else the process's. 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not HAS_USAGE:
        return 0
    peak = getrusage(RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_peak_bytes(device: torch.device) -> int:
    """Return the most memory held so far: on CUDA also what lies between tensors, and what is kept for the next ones."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes(device)


def memory_bytes(device: torch.device) -> int:
    """Return the memory in use: the device's on CUDA, else the process's (where only its peak can be told, that)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        return peak_memory_bytes(device)
    return pages * mmap.PAGESIZE


def reset_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory_bytes`` start again from what is in use now, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        release_memory(device)
        with suppress(OSError):  # not Linux
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def total_memory_bytes(device: torch.device) -> int:
    """Return how much memory the device or the machine has; 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reachable_memory_bytes(device: torch.device) -> int:
    """Return how much memory this process can hold: on CUDA what it holds and what is free there; else all; 0 if unknown.

    What other programs have, and the context of CUDA itself, is no part of it.
    """
    if device.type != "cuda":
        return total_memory_bytes(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def free_memory_bytes() -> int:
    """Return how much more memory this process can take: of the machine, of its control groups, and of its own limits."""
    return max(0, min(_free_parts(), default=sys.maxsize))


def _free_parts() -> Iterator[int]:
    facts = _numbers(Path("/proc/meminfo"))
    if "MemAvailable" in facts:
        yield 1024 * facts["MemAvailable"]
    for folder, limit, used, passing in _control_groups():
        most = _number(folder / limit)
        if most is not None:  # "max" is none
            yield most - (_number(folder / used) or 0) + _numbers(folder / "memory.stat").get(passing, 0)
    if HAS_USAGE:
        own = _numbers(Path("/proc/self/status"))
        for which, key in ((RLIMIT_AS, "VmSize"), (RLIMIT_DATA, "VmData")):
            most = getrlimit(which)[0]
            if most != RLIM_INFINITY and key in own:
                yield most - 1024 * own[key]


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folder of each group that this process is in, with the names of its limit, its use, and the part given back."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    new = ("memory.max", "memory.current", "inactive_file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for line in lines:
        number, kinds, path = line.split(":", 2)
        is_new = number == "0" and not kinds
        if is_new or "memory" in kinds.split(","):
            root = _CONTROL_GROUPS if is_new else _CONTROL_GROUPS / "memory"
            inner = root / path.lstrip("/")
            for folder in (inner, *inner.parents):  # a container sees its own group as the root
                if folder.is_relative_to(root):
                    yield (folder, *(new if is_new else old))


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of ``name number`` lines; nothing where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {found[0]: int(found[1]) for found in words if len(found) > 1 and found[1].isdecimal()}


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep what tensors on a CPU free, for those of the next step; return whether it does so now.

    The C library gives large blocks back to the system at once, and the system clears each page that it hands out again:
    5 to 10 % of a step (``docs/speed.md``). What a user set for the allocator stays.
    """
    if device.type != "cpu" or not _may_set_allocator():
        return False
    libc = ctypes.CDLL(None)
    # M_MMAP_MAX and M_TRIM_THRESHOLD of <malloc.h>: no block by itself, and none given back at the end of the heap. Large
    # blocks leave gaps for one another there, which ``KeptMemory`` gives back; outside the heap they cost 12 % of a step.
    return bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1))


def stop_keeping_memory(device: torch.device) -> None:
    """Take ``keep_freed_memory`` back: large blocks leave no gaps, which can take more than what is in use."""
    if device.type == "cpu" and _may_set_allocator():
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 65536)  # as the C library begins
        libc.mallopt(-1, 128 * 1024)
        release_memory(device)


def _may_set_allocator() -> bool:
    is_set = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in os.environ
    )
    return _GLIBC and not is_set


def release_memory(device: torch.device) -> None:
    """Give memory that is kept for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "cpu" and _GLIBC:
        ctypes.CDLL(None).malloc_trim(0)


def seed_everything(seed: int) -> None:
    """Seed every generator that training can draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # seeds CUDA too


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether every number of a floating-point tensor is finite; a tenth of the time of ``torch.isfinite``."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # a NaN is the least and the greatest
    return math.isfinite(low.item()) and math.isfinite(high.item())


class Context(Protocol):
    """What ``forward`` of a ``torch.autograd.Function`` keeps for ``backward``: torch's stub has no types for it.

    A function with values of its own to keep adds them in a subclass.
    """

    saved_tensors: tuple[torch.Tensor, ...]  # None where None was saved
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep tensors of the inputs and outputs."""


def applied(function: type[torch.autograd.Function], *arguments: object) -> torch.Tensor:
    """Return what ``function``, which has one result, makes of ``arguments``."""
    result: torch.Tensor = function.apply(*arguments)
    return result


def body_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the part of a language model of transformers that makes hidden states: all of it but its head."""
    body: torch.nn.Module = getattr(model, "base_model", model)
    if body is model:  # a class that names a part it does not have, as Llama 4's language model does
        body = getattr(model, "model", model)
    return body


def share_of(length: int, rank: int, size: int) -> tuple[int, int]:
    """Return which of ``length`` rows process ``rank`` of ``size`` has, as ``torch.chunk`` gives them out; may be none."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)


def replace_parameters(
    model: torch.nn.Module, fresh: Mapping[torch.nn.Parameter, torch.nn.Parameter]
) -> None:
    """Put other parameters in the place of some of ``model``; one that stands in several places does so afterwards."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in fresh:
                module._parameters[name] = fresh[parameter]
