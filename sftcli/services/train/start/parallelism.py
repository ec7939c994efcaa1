"""Whether the processes of a training hold all weights each or share them out, and the weights of either way."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.adapter import Quantize
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS, Parallel, TrainingSettings
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.adapter.targets import file_name
from sftcli.modeling.formats.file_weights import FileWeights
from sftcli.modeling.formats.sizes import adapter_bytes, parameters_bytes
from sftcli.runtime import total_memory_bytes
from sftcli.training.distributed.group import Group
from sftcli.training.probes.choices import WeightSharing
from sftcli.training.trainer import Trainer
from sftcli.training.weights.masters import AdapterWeights, MasterWeights
from sftcli.training.weights.sharded import ShardedWeights
from sftcli.training.weights.split import SplitWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRADIENTS = 1 / 64  # share of a device's memory that the gradients of one pass may take
ROOM = 0.8  # share of a device's memory that weights and what belongs to them may take; the rest is for activations


def check_sharing(settings: Settings) -> None:
    """Make sure that weights can be sharded if requested.

    Raises:
        UsageError: They cannot.
    """
    reason = _obstacle(settings)
    if settings.training.parallel is Parallel.FSDP and reason:
        raise UsageError(
            f"training.parallel is fsdp, and {reason}",
            hint="use training.parallel=ddp, where each process holds a full replica",
            location=Location(key="training.parallel"),
        )


def shares_weights(
    settings: Settings,
    folder: Path,
    group: Group,
    *,
    dtype: torch.dtype,
    device: torch.device,
    recorded: str | None = None,
) -> bool:
    """Return whether weights are sharded: if requested, or with ``auto`` if a replica does not fit.

    A process alone has nobody to share with. By ``auto`` a run that goes on does as it did, which is ``recorded``: sums in
    another order round otherwise.
    """
    if group.size == 1 or settings.training.parallel is Parallel.DDP:
        return False
    if settings.training.parallel is Parallel.FSDP:
        return True
    if recorded is not None:
        return recorded == WeightSharing.SHARED
    need = replicated_bytes(settings, folder, dtype)
    return not _obstacle(settings) and need > ROOM * _memory(group, device)


def make_weights(
    model: "PreTrainedModel",
    settings: Settings,
    group: Group,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shares: bool,
    files: FileWeights | None = None,
) -> MasterWeights:
    """Return the weights of ``model``, which they modify; before sharding it must be on the CPU, or in ``files``."""
    names = file_name if settings.adapter.is_on else None
    if shares:
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts = (3 * trained + 4 * sum(p.numel() for p in model.parameters())) // group.size
        return ShardedWeights(
            model,
            compute_dtype=dtype,
            group=group,
            device=device,
            exchange_each_micro_batch=parts + trained > ROOM * _memory(group, device),
            file_name=names,
            files=files,
        )
    memory = total_memory_bytes(device) if device.type == "cuda" else 0
    return whole_weights(model, settings.training, dtype=dtype, has_adapter=names is not None, memory=memory)


def whole_weights(
    model: "PreTrainedModel",
    training: TrainingSettings,
    *,
    dtype: torch.dtype,
    has_adapter: bool,
    memory: int,
) -> MasterWeights:
    """Return the weights of ``model``, all of them in one process, which they modify; ``memory`` as for ``has_room_for_gradients``."""
    if not has_adapter and dtype == torch.bfloat16 and OPTIMIZERS[training.optimizer].splits_masters:
        return SplitWeights(model)
    at_once = training.release_gradients or not has_room_for_gradients(model, dtype, memory)
    if has_adapter:
        return AdapterWeights(model, compute_dtype=dtype, file_name=file_name, collects_at_once=at_once)
    return MasterWeights(model, compute_dtype=dtype, collects_at_once=at_once)


def has_room_for_gradients(model: "PreTrainedModel", dtype: torch.dtype, memory: int) -> bool:
    """Return whether all gradients of a pass in ``dtype`` may be there together, beside their sums in float32.

    The calls of Python that this spares matter where a device is done before they are, which takes a small model: elsewhere
    than on CUDA ``memory`` is 0.
    """
    need = dtype.itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return need <= GRADIENTS * memory


def tell_sharing(trainer: Trainer, emit: EventSink) -> None:
    """Report how several processes share a step, and warn about idle ones."""
    size, micro_batches = trainer.group.size, len(trainer.plan.window(trainer.state.step))
    if size > 1:
        what = "each step and the weights, and" if trainer.weights.is_sharded else "each step and"
        emit(Notice(text=f"{size} processes share {what} sum their gradients once"))
    if micro_batches < size:
        emit(
            Warned(
                text=f"a step has {micro_batches} micro-batches for {size} processes: {size - micro_batches} stay idle: lower training.micro_batch_size "
                "or training.micro_batch_tokens, or raise training.batch_size"
            )
        )


def replicated_bytes(settings: Settings, folder: Path, dtype: torch.dtype) -> int:
    """Return what weights, gradients and AdamW's moments take in a process that holds them all, activations left out."""
    whole = parameters_bytes(folder)
    rounded = whole * dtype.itemsize // 4
    if settings.adapter.is_on:
        return rounded + 4 * adapter_bytes(folder, settings.adapter)
    return 4 * whole + (rounded if dtype != torch.float32 else 0)


def _memory(group: Group, device: torch.device) -> int:
    """Return how much memory a process may take; on a CPU all of them are taken to share one machine."""
    total = total_memory_bytes(device) or sys.maxsize  # where it cannot be told
    return total // group.size if device.type == "cpu" else total


def _obstacle(settings: Settings) -> str:
    if not OPTIMIZERS[settings.training.optimizer].has_adamw_moments:
        return f"{settings.training.optimizer} keeps a state that cannot be shared out"
    if settings.adapter.quantize is not Quantize.NONE:
        return "4-bit weights cannot be shared out"
    return ""
