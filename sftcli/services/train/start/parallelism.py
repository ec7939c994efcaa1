"""Whether the processes of a training hold all weights each or share them out, and the weights of either way."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftcli.config.schema.adapter import Quantize
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS, Parallel, TrainingSettings
from sftcli.data.batches.batch import Batch
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Notice, Warned
from sftcli.modeling.adapter.targets import file_name
from sftcli.modeling.formats.file_weights import FileWeights
from sftcli.modeling.formats.sizes import adapter_bytes, parameters_bytes
from sftcli.runtime import total_memory_bytes
from sftcli.training.distributed.group import Group
from sftcli.training.loss import BatchLoss, minimized
from sftcli.training.probes.choices import WeightSharing
from sftcli.training.probes.untouched import left_as_it_was
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
    reason, parallel = _obstacle(settings), settings.training.parallel
    if parallel in (Parallel.FSDP, Parallel.HSDP) and reason:
        raise UsageError(
            f"training.parallel is {parallel}, and {reason}",
            hint="use training.parallel=ddp, where each process holds a full replica",
            location=Location(key="training.parallel"),
        )


def choose_shards(
    settings: Settings,
    folder: Path,
    group: Group,
    *,
    dtype: torch.dtype,
    device: torch.device,
    recorded: str | None = None,
) -> int:
    """Return how many processes hold a replica together: 1 for each by itself, ``group.size`` for all.

    With ``auto`` that is 1 if a replica fits, else those of a machine if their shards fit, else all. A process alone has nobody
    to share with. By ``auto`` a run that goes on does as it did, which is ``recorded``: sums in another order round otherwise.

    Raises:
        UsageError: Groups of the size that is requested cannot be made.
    """
    parallel = settings.training.parallel
    if group.size == 1 or parallel is Parallel.DDP:
        return 1
    if parallel is Parallel.FSDP:
        return group.size
    if parallel is Parallel.HSDP:
        return _replica_processes(settings.training, group)
    if recorded is not None:
        return _recorded_shards(recorded, group)
    need, room = replicated_bytes(settings, folder, dtype), ROOM * _memory(group, device)
    if _obstacle(settings) or need <= room:
        return 1
    has_machines = settings.training.shard_processes or group.per_machine
    shards = _replica_processes(settings.training, group) if has_machines else group.size
    return shards if need <= shards * room else group.size


def _replica_processes(training: TrainingSettings, group: Group) -> int:
    """Return how many processes ``training`` puts into a group with a replica of its own.

    Raises:
        UsageError: They do not divide all, or machines have different numbers of processes.
    """
    shards = training.shard_processes or group.per_machine
    if not shards:
        raise UsageError(
            "training.parallel is hsdp, and the machines have different numbers of processes, or ranks that are not consecutive",
            hint="start the same number on each, machine by machine, or set training.shard_processes",
            location=Location(key="training.parallel"),
        )
    if group.size % shards:
        raise UsageError(
            f"training.shard_processes is {shards}, and {group.size} processes are no multiple of it",
            hint="use a divisor of their number",
            location=Location(key="training.shard_processes"),
        )
    return shards


def sharing_of(shards: int, group: Group) -> str:
    """Return how a run records that ``shards`` processes of ``group`` hold a replica together."""
    if shards == 1:
        return WeightSharing.WHOLE
    return WeightSharing.SHARED if shards == group.size else f"{WeightSharing.SHARED} by {shards}"


def _recorded_shards(recorded: str, group: Group) -> int:
    kind, _, shards = recorded.partition(" by ")
    return 1 if kind == WeightSharing.WHOLE else int(shards or group.size)


def make_weights(
    model: "PreTrainedModel",
    settings: Settings,
    group: Group,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shards: int,
    files: FileWeights | None = None,
) -> MasterWeights:
    """Return the weights of ``model``, which they modify; before sharding it must be on the CPU, or in ``files``."""
    names = file_name if settings.adapter.is_on else None
    if shards > 1:
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        beside = round((1 + OPTIMIZERS[settings.training.optimizer].state_share) * trained)
        parts = (beside + 4 * sum(p.numel() for p in model.parameters())) // shards
        return ShardedWeights(
            model,
            compute_dtype=dtype,
            group=group,
            shards=shards,
            device=device,
            exchange_each_micro_batch=parts + trained > ROOM * _memory(group, device),
            file_name=names,
            files=files,
        )
    # Several processes exchange gradients as soon as they are made, so they collect them at once.
    memory = total_memory_bytes(device) if device.type == "cuda" and group.size == 1 else 0
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


def can_ease_together(weights: MasterWeights, batch_loss: BatchLoss, batch: Batch) -> bool:
    """Return whether all processes can take a step again in which one ran out of memory.

    Where they share the weights out, a pass over ``batch`` shows what each pass exchanges. All must call it.
    """
    if not isinstance(weights, ShardedWeights):
        return True
    with left_as_it_was(weights.model):
        return weights.rehearse(lambda: minimized(batch_loss(batch)).backward())


def tell_sharing(trainer: Trainer, emit: EventSink) -> None:
    """Report how several processes share a step, and warn about idle ones."""
    group, micro_batches = trainer.group, len(trainer.plan.window(trainer.state.step))
    size, idle = group.size, (group.turns - micro_batches) * group.parts
    if size > 1:
        rows = f"; {group.parts} of them share each row" if group.parts > 1 else ""
        what = f"{size} processes share each step{_shared(trainer)} and sum their gradients once{rows}"
        emit(Notice(text=what))
    if idle > 0:
        emit(
            Warned(
                text=f"a step has {micro_batches} micro-batches for {size} processes: {idle} stay idle: lower training.micro_batch_size "
                "or training.micro_batch_tokens, or raise training.batch_size"
            )
        )


def _shared(trainer: Trainer) -> str:
    weights = trainer.weights
    if not isinstance(weights, ShardedWeights):
        return ""
    is_grouped = weights.shards < trainer.group.size
    return f", in groups of {weights.shards} the weights," if is_grouped else " and the weights,"


def replicated_bytes(settings: Settings, folder: Path, dtype: torch.dtype) -> int:
    """Return what weights, gradients and optimizer state take in a process that holds them all, activations left out."""
    facts = OPTIMIZERS[settings.training.optimizer]
    times = 2 + facts.state_share  # weights, gradients and state are so often the float32 size of what trains
    whole = parameters_bytes(folder)
    rounded = whole * dtype.itemsize // 4
    if settings.adapter.is_on:
        return rounded + round(times * adapter_bytes(folder, settings.adapter))
    has_copies = dtype != torch.float32 and not (facts.splits_masters and dtype == torch.bfloat16)
    return round(times * whole) + (rounded if has_copies else 0)


def _memory(group: Group, device: torch.device) -> int:
    """Return how much memory a process may take; on a CPU those of a machine share it."""
    total = total_memory_bytes(device) or sys.maxsize  # where it cannot be told
    return total // (group.per_machine or group.size) if device.type == "cpu" else total


def _obstacle(settings: Settings) -> str:
    if not OPTIMIZERS[settings.training.optimizer].takes_shards:
        return f"{settings.training.optimizer} keeps a state that cannot be shared out"
    if settings.adapter.quantize is not Quantize.NONE:
        return "4-bit weights cannot be shared out"
    return ""
