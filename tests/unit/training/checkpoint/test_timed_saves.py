"""Checkpoints by the clock: when they are due, and who says so."""

import pytest

from sftcli.events import NeverStop
from sftcli.training.distributed.agreed_stop import AgreedStop, TimedSaves
from sftcli.training.distributed.group import Group


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Asked(NeverStop):
    def __init__(self) -> None:
        self.count = 0

    def save_requested(self) -> bool:
        self.count += 1
        return self.count == 1


def timed(clock: Clock, *, rank: int = 0, seconds: float = 60.0, stop=None) -> TimedSaves:
    group = Group(rank=rank, size=1)
    return TimedSaves(stop=stop or NeverStop(), clock=clock, seconds=seconds, group=group, begun_at=clock())


def test_one_is_due_when_the_last_is_that_old_and_not_before():
    clock = Clock()
    saves = timed(clock)
    clock.now = 59.9
    assert not saves.save_requested()
    clock.now = 60.0
    assert saves.save_requested()
    saves.begun_at = clock()
    assert not saves.save_requested()


@pytest.mark.parametrize(("rank", "seconds"), [(1, 60.0), (0, 0.0)])
def test_another_process_and_a_run_without_the_setting_never_ask(rank, seconds):
    clock = Clock()
    saves = timed(clock, rank=rank, seconds=seconds)
    clock.now = 1e9
    assert not saves.save_requested()


def test_all_processes_hear_what_the_first_one_decides():
    class Both(Group):
        def any(self, flag: bool) -> bool:
            told.append(flag)
            return flag or first.save_requested()

    told: list[bool] = []
    clock = Clock()
    first = timed(clock)
    other = AgreedStop(stop=timed(clock, rank=1), group=Both(rank=1, size=2))
    assert not other.save_requested()
    clock.now = 60.0
    assert other.save_requested()
    assert told == [False, False]


def test_a_signal_that_asks_is_handed_on_also_when_one_is_due():
    clock, asked = Clock(), Asked()
    saves = timed(clock, stop=asked)
    clock.now = 60.0
    assert saves.save_requested()
    assert asked.count == 1
