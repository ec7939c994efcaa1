"""Several processes over gloo, for tests of what they do together."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from sftcli.training.distributed.group import Group
from tests.support.forked import end_forked, start_forked

LONGEST = timedelta(seconds=100)  # that one waits for another that has failed


def run_together(
    task: Callable[..., None], *, size: int, folder: Path, args: tuple[object, ...] = ()
) -> None:
    """Call ``task(group, *args)`` in ``size`` processes; an error in one of them is printed, and raised here."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    children = [start_forked(partial(_one_of_several, rank, size, store, task, args)) for rank in range(size)]
    codes = [end_forked(child) for child in children]
    assert codes == [0] * size


def _one_of_several(
    rank: int, size: int, store: Path, task: Callable[..., None], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=LONGEST
    )
    task(Group(rank=rank, size=size), *args)
    dist.destroy_process_group()
