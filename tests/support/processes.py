"""Several processes over gloo, for tests of what they do together."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sftcli.training.distributed import Group


def run_together(
    task: Callable[..., None], *, size: int, folder: Path, args: tuple[object, ...] = ()
) -> None:
    """Call ``task(group, *args)`` in ``size`` processes; an error in one of them is raised here."""
    folder.mkdir(parents=True, exist_ok=True)
    spawn(_one_of_several, args=(size, str(folder), task, args), nprocs=size)  # type: ignore[no-untyped-call]


def _one_of_several(
    rank: int, size: int, folder: str, task: Callable[..., None], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        task(Group(rank=rank, size=size), *args)
    finally:
        dist.destroy_process_group()
