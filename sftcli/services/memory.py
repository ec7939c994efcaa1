"""Running out of memory as an error that names the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sftcli.config.training_settings import TrainingSettings
from sftcli.errors import ResourceError

_CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError on the CPU, with this name in it


@contextmanager
def memory_errors(settings: TrainingSettings, *, resume_command: str) -> Iterator[None]:
    """Turn running out of memory inside the block into an error with flags, the one that costs no quality first.

    Raises:
        ResourceError: Memory ran out; checkpoints are intact.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and _CPU_ALLOCATOR not in str(error):
            raise
        raise ResourceError(
            f"out of memory with micro-batches of {settings.micro_batch_size} rows; checkpoints are intact",
            hint="in a new run lower training.micro_batch_size (the updates stay the same), then data.max_tokens, or "
            f"choose a smaller model; where something else took the memory: {resume_command}",
        ) from error
