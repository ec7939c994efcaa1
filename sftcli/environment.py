"""Environment variables: those that libraries read once and that are set before torch is imported, and what others tell."""

import os
import sys
from collections.abc import Mapping

_KEPT_KERNELS = 128
_SCHEDULER_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_SERVICE_HOST")
TORCHRUN = "TORCHELASTIC_RUN_ID"  # which it always sets
_NO_ID = "none"  # where nobody gave it one


def set_defaults() -> None:
    """Set what makes work on a CPU faster, what keeps memory from growing, and what lets products on CUDA repeat their bits."""
    _bound_kernels()
    _let_segments_grow()
    # cuBLAS picks its way by the workspace that is free, unless each stream has some of its own. 8 of 4 MB is as much as torch
    # takes on a Hopper in any case. It is read once, so a run cannot set it by its settings.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "OMP_WAIT_POLICY" in os.environ:
        return
    # Threads that wait for each other must soon sleep: on a machine that does other work too, spinning made training two
    # times slower, and without other work it gains nothing.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # Between the small operations of decoding, though, waking a thread takes longer than the wait: a few microseconds of
    # spinning made a step of one row 10 to 20 % faster, and left training as it was.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _bound_kernels() -> None:
    """Keep fewer kernels: oneDNN, and torch around it, keep one for each of the last 1024 shapes of a matrix product.

    In bfloat16 one takes 0.6 to 0.8 MB, and each step of packed rows has shapes of its own, so that nearly all of them are
    never used again. They also lie between freed blocks, which then cannot become one. A pass has some 30 shapes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KEPT_KERNELS))


def _let_segments_grow() -> None:
    """Let torch's memory on CUDA grow in place: each pass of packed rows has a length of its own, and its blocks fit no others.

    CUDA reads it when it starts. What a user set stays, under the older name too; Windows knows no such memory.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def is_scheduled(environ: Mapping[str, str]) -> bool:
    """Return whether a scheduler of a cluster started this process, and may end it."""
    return any(name in environ for name in _SCHEDULER_VARIABLES)


def job_of(environ: Mapping[str, str]) -> str:
    """Return the name of the job whose processes are started anew where one was lost, one start at a time; empty for none."""
    run = environ.get(TORCHRUN, "")
    if run not in ("", _NO_ID):
        return f"torchrun {run}"
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "")
    return f"Slurm {job}.{step}" if job and step else ""
