"""Which kernels CUDA computes with: those that repeat their bits, and exact float32 products, unless the settings say otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import Location, UsageError, first_line
from sftcli.events import EventSink, Notice
from sftcli.runtime import Kernels, choose_device, set_kernels, used_kernels

_OF_TORCH = (
    "use_deterministic_algorithms"  # in each error of torch about a kernel that does not repeat its bits
)


@contextmanager
def kernels_as_set(settings: TrainingSettings, emit: EventSink) -> Iterator[None]:
    """Compute in the block with the kernels that ``settings`` ask for, say which promise holds, and put back what was before.

    A CPU needs neither: its kernels repeat their bits with the same threads, and its float32 products are exact.

    Raises:
        UsageError: An operation has no kernel that repeats its bits.
    """
    if choose_device().type != "cuda":
        yield
        return
    before = used_kernels()
    set_kernels(
        Kernels(deterministic=settings.deterministic, tf32=settings.tf32, tf32_convolutions=settings.tf32)
    )
    emit(Notice(text=promise(settings)))
    try:
        yield
    except RuntimeError as error:
        if _OF_TORCH not in str(error):
            raise
        raise UsageError(
            f"an operation of this model has no kernel on CUDA that gives the same bits each time: {first_line(error)}",
            hint="train without that promise: --set training.deterministic=false; a run that has begun goes on so with "
            "--allow-change training.deterministic as well",
            location=Location(key="training.deterministic"),
        ) from error
    finally:
        set_kernels(before)


def why_not_equal(settings: TrainingSettings, device: torch.device) -> str:
    """Return why steps that were replayed on ``device`` may give other bits."""
    if device.type == "cuda" and not settings.deterministic:
        return promise(settings) + "; a new run with the default does: --set training.deterministic=true"
    return "the machine, its threads or the library versions differ from those of the run"


def promise(settings: TrainingSettings) -> str:
    """Return what a run on CUDA promises about its bits."""
    if settings.deterministic:
        return "kernels that give the same bits each time: the run repeats bit for bit on this GPU with these libraries"
    return "training.deterministic is false: on CUDA the run does not repeat bit for bit, nor does it when it is resumed"
