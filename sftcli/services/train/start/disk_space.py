"""How much disk the checkpoints of a run will take, and whether it is there."""

import math
import shutil
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.run import CheckpointSettings
from sftcli.config.schema.settings import Settings
from sftcli.config.schema.training import OPTIMIZERS
from sftcli.errors import StorageError
from sftcli.events import EventSink, Warned
from sftcli.figures import size
from sftcli.modeling.formats.folder_check import tensor_shapes
from sftcli.modeling.formats.sizes import adapter_bytes, embedding_bytes, parameters_bytes
from sftcli.services.runs.folder import RunFolder
from sftcli.training.checkpoint.names import list_checkpoints
from sftcli.training.selection import trained_share


def check_space(run: RunFolder, one_bytes: int, settings: CheckpointSettings, emit: EventSink) -> None:
    """Make sure that the checkpoints that will exist at once fit on the run's disk.

    Args:
        run: Where they go.
        one_bytes: Size of one.
        settings: How many are kept.
        emit: Told when room is scarce.

    Raises:
        StorageError: They do not fit.
    """
    have = len(list_checkpoints(run.checkpoints))
    most = 1 if settings.every_steps == 0 else settings.keep_last + 1  # those by the clock may never come
    need, free = one_bytes * max(1, most - have), shutil.disk_usage(storage.nearest_folder(run.path)).free
    if free < need:
        raise StorageError(
            f"the disk of {run.path} has {size(free)} free; checkpoints of this model need {size(need)}",
            hint="free space, choose another --set run.root=DIR, or lower checkpoint.keep_last",
        )
    if free < 3 * one_bytes:
        emit(
            Warned(
                text=f"the disk of {run.path} has only {size(free)} free; a checkpoint takes {size(one_bytes)}"
            )
        )


def checkpoint_bytes(settings: Settings, folder: Path) -> int:
    """Return about what a checkpoint takes: float32 weights, those that are frozen too, and the optimizer's state.

    Of an adapter, its own weights and their moments alone, at most.
    """
    if settings.adapter.is_on:
        return 3 * adapter_bytes(folder, settings.adapter)
    training = settings.training
    share = OPTIMIZERS[training.optimizer].state_share
    weights = parameters_bytes(folder)
    frozen = 0 if training.train_embeddings else embedding_bytes(folder)
    if training.train or training.freeze:
        sizes = {name: 4 * math.prod(shape) for name, shape in tensor_shapes(folder).items()}
        frozen = max(
            frozen, round(weights * (1 - trained_share(sizes, train=training.train, freeze=training.freeze)))
        )
    return round(weights + share * (weights - frozen))
