"""What the processes of one training do together, over gloo."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sftcli.training.distributed import Group

SHAPES = ((3, 2), (5,))


def _in_one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        group = Group(rank=rank, size=2)
        assert group.sum([rank + 1.0, 10.0]) == [3.0, 20.0]
        assert group.any(rank == 1)
        assert not group.any(False)
        gradients = [torch.full(shape, float(rank + 1)) for shape in SHAPES]
        group.exchange(gradients)
        assert all(torch.equal(grad, torch.full_like(grad, 3.0)) for grad in gradients)
        assert group.exchanged_bytes == 4 * (3 * 2 + 5)
    finally:
        dist.destroy_process_group()


def test_two_processes_sum_decide_and_exchange_gradients_alike(tmp_path: Path) -> None:
    spawn(_in_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]


def test_shares_of_any_number_of_processes_are_all_items_once() -> None:
    for size in range(1, 5):
        shares = [Group(rank=rank, size=size).share(range(7)) for rank in range(size)]
        assert sorted(item for share in shares for item in share) == list(range(7))


def test_a_process_alone_changes_nothing() -> None:
    group, gradient = Group(), torch.ones(3)
    group.exchange([gradient])
    assert group.sum([2.0]) == [2.0]
    assert torch.equal(gradient, torch.ones(3))
    assert group.exchanged_bytes == 0
