"""Compiles decoder layers where the settings say so, with a pass over real rows, so that a fault shows before the training."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.training import Compile, TrainingSettings
from sftcli.data.batches.batch import Batch
from sftcli.errors import Location, ResourceError, UsageError
from sftcli.events import EventSink, Notice, Warned
from sftcli.memory_faults import is_out_of_memory
from sftcli.modeling.kernels.compiled import BY, compile_layers, decoder_layers, names_of, run_as_before
from sftcli.training.loss import BatchLoss, minimized
from sftcli.training.probes.choices import RowSharing
from sftcli.training.probes.untouched import left_as_it_was

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_COMPILES: frozenset[str] = frozenset()
"""Devices on which ``auto`` compiles: none, until it has been measured on one."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # in which CUDA attends to packed documents without a loop
_WORTH_TELLING = 200  # letters of an error of the compiler


def wants_compiled(
    setting: Compile, device: torch.device, recorded: tuple[str, ...] | None, *, shares: bool
) -> bool:
    """Return whether layers are compiled; by ``auto`` a run that goes on does as it did, which is ``recorded``.

    Raises:
        UsageError: They are to be, and several processes share their weights or their rows out.
    """
    if setting is Compile.ON and shares:
        raise UsageError(
            "training.compile is on, and processes share the weights of a layer out, or its rows",
            hint="use training.compile=off, or training.parallel=ddp and training.context_processes=1",
            location=Location(key="training.compile"),
        )
    if setting is not Compile.AUTO:
        return setting is Compile.ON
    if recorded is not None:
        return not shares and any(name.endswith(f" by {BY}") for name in recorded)
    return device.type in AUTO_COMPILES and not shares


def try_compiled(
    model: "PreTrainedModel",
    batch: Batch,
    batch_loss: BatchLoss,
    *,
    settings: TrainingSettings,
    sharing: RowSharing,
    discard: Callable[[], None],
    emit: EventSink,
    backend: str = "inductor",
) -> tuple[str, ...]:
    """Compile the layers of ``model`` and return how that is recorded; nothing where it failed and ``auto`` had asked for it.

    Args:
        model: Its layers run what their classes say.
        batch: Rows as the training will have them, on the device.
        batch_loss: Their loss.
        settings: They say who asks.
        sharing: How documents of one row are kept apart.
        discard: Forgets gradients.
        emit: Hears what it costs, and that it failed.
        backend: What torch compiles with.

    Raises:
        ResourceError: It failed, and the user had asked for it.
    """
    layers = decoder_layers(model)
    if not layers:
        return _refused(model, "its layers are not known", settings, emit)
    device, dtype = model.device, next(model.parameters()).dtype
    has_kernel = device.type == "cuda" and dtype in _KERNEL_DTYPES
    emit(
        Notice(
            text=f"compiling {len(layers)} decoder layers (training.compile): the first step takes some minutes on two CPU cores, "
            "less on more, at each start that finds none in the compiler's cache"
        )
    )
    compile_layers(model, traces_attention=has_kernel or sharing is not RowSharing.BOUNDS, backend=backend)
    try:
        with left_as_it_was(model):
            model.train()
            minimized(batch_loss(batch)).backward()
    except Exception as error:  # noqa: BLE001 - a compiler raises what it likes
        if not is_out_of_memory(error):  # the first step knows how to take less
            run_as_before(model)
            return _refused(model, _first_lines(error), settings, emit)
    finally:
        discard()
    return names_of(model)


def _refused(
    model: "PreTrainedModel", why: str, settings: TrainingSettings, emit: EventSink
) -> tuple[str, ...]:
    text = f"the layers of {type(model).__name__} cannot be compiled: {why}"
    if settings.compile is Compile.ON:
        raise ResourceError(
            text,
            hint="install a C++ compiler that torch finds (g++, or the one named by CXX), or leave training.compile=off",
            location=Location(key="training.compile"),
        )
    emit(Warned(text=f"{text}; they run as they are"))
    return ()


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:_WORTH_TELLING]  # "backend raised:", and what
