"""How several processes tell each other what to do and why they end: two of them at one store, in turn."""

import pytest
import torch.distributed as dist

from sftcli.errors import (
    DataError,
    DivergedError,
    Location,
    MismatchError,
    ReportedByPeerError,
    ResourceError,
    StoppedError,
    UnsavedError,
)
from sftcli.events import NeverStop
from sftcli.services.processes import peers as processes
from sftcli.services.processes.failures import PeerBugError, describe_failure, error_of
from sftcli.services.processes.meeting import machine_size
from sftcli.services.processes.peers import ConnectedPeers
from sftcli.training.distributed.group import Group

BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:58722")


class Stopped(NeverStop):
    def requested(self) -> bool:
        return True


@pytest.fixture
def pair() -> tuple[ConnectedPeers, ConnectedPeers]:
    store = dist.HashStore()
    leader, follower = (ConnectedPeers(Group(rank=rank, size=2), store, store) for rank in range(2))
    return leader, follower


@pytest.mark.parametrize(
    "error",
    [
        DataError("row 7 is bad", hint="mend it", location=Location(file="a.jsonl", line=7)),
        DivergedError("no finite loss"),
        ResourceError("no memory", hint="less"),
        StoppedError(),
    ],
    ids=lambda error: error.kind,
)
def test_error_is_the_same_after_its_travel(error):
    found = error_of(describe_failure(error, rank=1))
    assert type(found) is type(error)
    assert (found.message, found.hint, found.location) == (error.message, error.hint, error.location)


def test_error_of_a_kind_that_has_no_name_of_its_own_keeps_its_exit_code():
    found = error_of(describe_failure(UnsavedError("no drive"), rank=1))
    assert (found.exit_code, found.message) == (74, "no drive")


def test_bug_travels_with_its_process_and_traceback():
    try:
        {}["missing"]
    except KeyError as error:
        found = error_of(describe_failure(error, rank=3))
    assert isinstance(found, PeerBugError)
    assert str(found) == "process 3: KeyError: 'missing'"
    assert "in test_bug_travels" in found.__notes__[0]


def test_what_the_first_process_tells_is_heard_in_order(pair):
    leader, follower = pair
    leader.broadcast({"run": "a"})
    leader.broadcast({"run": "b"})
    assert [follower.receive(NeverStop())["run"] for _ in range(2)] == ["a", "b"]


def test_work_is_done_by_the_first_process_and_then_by_the_others(pair):
    done = []
    for peers in pair:
        assert (
            peers.rank_zero_first(lambda peers=peers: done.append(peers.group.rank) or "result") == "result"
        )
    assert done == [0, 1]


def test_first_process_shows_the_failure_of_another_one(pair):
    leader, follower = pair
    ending = follower.end_with(DataError("row 7 is bad"))
    assert isinstance(ending, ReportedByPeerError)
    assert ending.exit_code == 65
    shown = leader.end_with(BROKEN)
    assert isinstance(shown, DataError)
    assert shown.message == "row 7 is bad"


def test_failure_of_the_first_process_is_shown_as_it_is_and_followed(pair):
    leader, follower = pair
    error = DivergedError("no finite loss")
    assert leader.end_with(error) is error
    assert isinstance(ending := follower.end_with(BROKEN), ReportedByPeerError)
    assert ending.exit_code == 4
    with pytest.raises(ReportedByPeerError):
        follower.receive(NeverStop())
    with pytest.raises(ReportedByPeerError):
        follower.await_end()


def test_what_happens_to_all_is_shown_once(pair):
    leader, follower = pair
    assert isinstance(follower.end_with(DivergedError("no finite loss")), ReportedByPeerError)
    assert isinstance(leader.end_with(DivergedError("no finite loss")), DivergedError)


def test_connection_that_breaks_without_a_word_is_71(pair, monkeypatch):
    monkeypatch.setattr(processes, "LOST_SECONDS", 0.0)
    leader, follower = pair
    assert isinstance(ending := follower.end_with(BROKEN), ReportedByPeerError)
    shown = leader.end_with(BROKEN)
    assert isinstance(shown, ResourceError)
    assert "one of the 2 processes was killed" in shown.message
    assert shown.exit_code == ending.exit_code == 71


def test_stop_before_the_first_step_ends_every_process_with_the_code_of_its_own_signal(pair):
    leader, follower = pair
    with pytest.raises(StoppedError) as caught:
        follower.receive(Stopped())
    assert follower.end_with(caught.value) is caught.value
    assert isinstance(leader.end_with(BROKEN), StoppedError)


def test_follower_waits_for_the_end_of_the_first_process(pair):
    leader, follower = pair
    leader.say_over()
    follower.await_end()


def test_processes_that_found_other_data_are_refused(pair):
    leader, follower = pair
    leader.agree_on({"data": "a", "model": "m"})
    with pytest.raises(MismatchError, match="process 1 found a different model than process 0"):
        follower.agree_on({"data": "a", "model": "n"})


@pytest.mark.parametrize(
    ("seats", "size"),
    [
        ([(0, 2), (1, 2)], 2),
        ([(0, 2), (1, 2), (0, 2), (1, 2)], 2),
        ([(0, 2), (0, 2), (1, 2), (1, 2)], 0),  # dealt out in turn
        ([(0, 2), (1, 2), (0, 1)], 0),
        ([(0, 1), (0, 2), (1, 2)], 0),
    ],
)
def test_machines_count_where_they_are_alike(seats, size):
    assert machine_size(seats) == size
