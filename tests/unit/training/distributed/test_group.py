"""What the processes of one training do together, over gloo."""

from pathlib import Path

from sftcli.training.distributed.group import Group
from tests.support.processes import run_together


def _in_one_of_two(group: Group) -> None:
    rank = group.rank
    assert group.sum([rank + 1.0, 10.0]) == [3.0, 20.0]
    assert group.any(rank == 1)
    assert not group.any(False)


def test_two_processes_sum_and_decide_alike(tmp_path: Path) -> None:
    run_together(_in_one_of_two, size=2, folder=tmp_path)


def test_shares_of_any_number_of_processes_are_all_items_once() -> None:
    for size in range(1, 5):
        shares = [Group(rank=rank, size=size).share(range(7)) for rank in range(size)]
        assert sorted(item for share in shares for item in share) == list(range(7))


def test_a_process_alone_changes_nothing() -> None:
    assert Group().sum([2.0]) == [2.0]
    assert not Group().any(False)


def test_neighbors_that_share_rows_get_the_same_ones_and_their_own_part() -> None:
    groups = [Group(rank=rank, size=4, parts=2) for rank in range(4)]
    assert [list(group.rounds(range(3))) for group in groups] == [
        [(0, True), (2, True)],
        [(0, True), (2, True)],
        [(1, True), (2, False)],
        [(1, True), (2, False)],
    ]
    assert [group.part for group in groups] == [0, 1, 0, 1]
