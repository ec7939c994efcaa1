"""A job of torchrun that loses machines and gains some goes on by itself, and ends with the losses of one undisturbed process."""

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.agents import Job
from tests.support.several import assert_same_training, events, flags, make_place, steps, train_here

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc"),
    pytest.mark.slow,
]
STEPS = 200  # so many that a machine can join before the end
GENTLE = "training.learning_rate=1e-4"  # at a higher one so many steps carry roundings further than 1e-5
EARLY = 20  # steps before something happens
VANISHED = 200  # seconds in which the silence of a machine is noticed, and all go on


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    train_here(place, place / "model", "alone", GENTLE, max_steps=STEPS)
    return "alone"


def job(place: Path, name: str, *changes: str) -> Job:
    return Job(
        place,
        name,
        ["train", *flags(place / "model", name, GENTLE, *changes, max_steps=STEPS), "--resume", "auto"],
    )


@contextmanager
def running(place: Path, run: str, *changes: str, machines: int = 2, early: int = EARLY) -> Iterator[Job]:
    """Start a job, which has taken so many steps inside the block."""
    with job(place, run, *changes) as elastic:
        for _ in range(machines):
            elastic.add_machine()
        elastic.wait_until(lambda: len(steps(place, run)) >= early)
        yield elastic


def starts(place: Path, run: str) -> list[int]:
    """Return the step from which each start of the training has gone on."""
    return [event["step"] for event in events(place, run) if event["event"] == "FitStarted"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_machine_that_is_lost_restarts_the_others_and_a_new_one_joins_them(place, alone, parallel):
    run = f"lost-and-added-{parallel}"
    with running(place, run, f"training.parallel={parallel}", machines=3) as elastic:
        elastic.machine_of(rank=0).lose()  # the one that writes
        elastic.wait_until(lambda: len(starts(place, run)) == 2 and steps(place, run)[-1]["step"] > 2 * EARLY)
        elastic.add_machine()
        codes = elastic.end()
        assert sorted(codes) == [-signal.SIGKILL, 0, 0, 0], elastic.said()
    sizes = [event["text"] for event in events(place, run) if "processes was" in event.get("text", "")]
    assert ["was 3, is 2" in sizes[0], "was 2, is 3" in sizes[1]] == [True, True]
    assert starts(place, run)[1] <= EARLY + 2
    assert_same_training(place, run, alone)


def test_last_machine_goes_on_alone(place, alone):
    run = "last"
    with running(place, run) as elastic:
        elastic.machine_of(rank=1).lose()
        assert sorted(elastic.end()) == [-signal.SIGKILL, 0], elastic.said()
    assert_same_training(place, run, alone)


def test_machine_that_is_taken_back_with_a_warning_costs_no_step(place, alone):
    run = "taken-back"
    with running(place, run) as elastic:
        elastic.machine_of(rank=0).agent.send_signal(signal.SIGTERM)
        codes = elastic.end()
        said = elastic.said()
        assert sorted(codes) == [0, 1], said
    stopped = re.findall(r"training stopped at step (\d+)", said)
    assert starts(place, run) == [0, *map(int, stopped)]
    assert_same_training(place, run, alone)


def test_machine_that_is_lost_before_the_first_checkpoint_lets_the_others_start_over(place, alone):
    run = "early"
    late = "checkpoint.every_steps=0"
    with running(place, run, late, early=2) as elastic:
        elastic.machine_of(rank=0).lose()
        assert sorted(elastic.end()) == [-signal.SIGKILL, 0], elastic.said()
        assert "no checkpoint yet: starting over" in elastic.said()
    assert_same_training(place, run, alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_machine_that_vanishes_without_a_word_is_missed_after_a_minute(place, alone, rank):
    """It answers nothing and closes no connection: stopped processes do the same."""
    run = f"vanished-{rank}"
    with running(place, run) as elastic:
        gone, begin = elastic.machine_of(rank=rank), time.monotonic()
        gone.send(signal.SIGSTOP)
        elastic.wait_until(lambda: len(starts(place, run)) == 2)
        assert time.monotonic() - begin < VANISHED
        gone.lose()
        assert sorted(elastic.end()) == [-signal.SIGKILL, 0], elastic.said()
    if rank == 1:  # rank 0 is there to say it
        assert "nothing was heard of process 1 of 2 for 60 s" in elastic.said()
    assert_same_training(place, run, alone)
