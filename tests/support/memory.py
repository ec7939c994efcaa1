"""Errors by which libraries say that memory ran out, in their words."""

import errno

import torch
import torch.distributed as dist


class OutOfResources(Exception):  # noqa: N818 - Triton's name
    """As Triton raises it where a kernel asks for more than the card has."""


FAULTS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "runtime": torch.AcceleratorError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "nccl": dist.DistBackendError(
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"
    ),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
KERNEL = OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 101376")
