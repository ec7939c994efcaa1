"""Processes of an attempt find each other at a store that has the words of earlier attempts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from sftcli.errors import ResourceError
from sftcli.services.processes import meeting
from sftcli.services.processes.meeting import Meeting, meet
from sftcli.services.processes.rank import ATTEMPT, Place


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def place(rank: int, size: int, port: int, *, attempt: str | None = None) -> Place:
    return Place(
        rank=rank, size=size, local_rank=rank, local_size=size, address="127.0.0.1", port=port, is_hosted=True,
        attempt=attempt, threads=1,
    )  # fmt: skip


def all_meet(port: int, size: int, *, late_first: bool = False) -> list[Meeting]:
    """Let ``size`` processes meet, the first one last if so."""
    ranks = [*range(size)][:: -1 if late_first else 1]
    with ThreadPoolExecutor(size) as pool:
        met = [pool.submit(meet, place(rank, size, port)) for rank in ranks]
        return [one.result(timeout=20) for one in met]


def test_attempts_at_one_store_have_words_of_their_own(store):
    found = [all_meet(store.port, size) for size in (2, 3, 2)]
    names = [{one.prefix for one in met} for met in found]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    assert [met[0].per_machine for met in found] == [2, 3, 2]


def test_processes_that_come_before_the_first_one_do_not_take_an_earlier_attempt_for_theirs(store):
    first, second = all_meet(store.port, 3), all_meet(store.port, 3, late_first=True)
    assert len({one.prefix for one in second}) == 1
    assert second[0].prefix != first[0].prefix


def test_processes_that_are_started_once_meet_under_the_name_that_their_launcher_knows(store):
    (met,) = [meet(place(0, 1, store.port, attempt=ATTEMPT))]
    assert met.prefix == "sft/0"


def test_store_that_is_gone_is_71_and_names_the_variable_of_torchrun(monkeypatch):
    monkeypatch.setattr(meeting, "HOSTED_SECONDS", 0.2)
    with pytest.raises(ResourceError, match="did not all connect to ") as caught:
        meet(place(1, 2, 1))
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caught.value.hint


def test_process_whose_first_one_does_not_come_ends_so_that_its_launcher_starts_it_again(store, monkeypatch):
    monkeypatch.setattr(meeting, "HOSTED_MEETING_SECONDS", 0.3)
    with pytest.raises(ResourceError, match=r"process 0 did not come within 0\.3 s"):
        meet(place(1, 2, store.port))
