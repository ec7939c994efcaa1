"""What happens to one of several processes, or is sent to it, ends all of them alike, whether weights are shared out or not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.several import (
    checkpoint_bytes,
    end,
    events,
    flags,
    make_place,
    sft,
    signal_after,
    start,
    steps,
    train_here,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc"),
    pytest.mark.slow,
    pytest.mark.parametrize("parallel", ["ddp", "fsdp"]),
]
MANY = 100_000  # steps: more than a test waits for
GOOD_STEPS = 4  # that a faulty process takes
SECONDS = 30  # in which all have to end on a busy machine; torch itself gives a process 30 before it kills it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    train_here(place, place / "model", "alone")
    return "alone"


def start_two(place: Path, parallel: str, run: str, *changes: str) -> subprocess.Popen[str]:
    """Start a training of two processes that goes on for as long as a test wants."""
    changes = (f"training.parallel={parallel}", *changes)
    return start(place, "train", *flags(place / "model", run, *changes, max_steps=MANY), "--processes", "2")


def start_faulty(place: Path, parallel: str, run: str, fault: str) -> subprocess.Popen[str]:
    """Start a training of eight steps by two processes, of which the second has a fault."""
    arguments = flags(place / "model", run, f"training.parallel={parallel}")
    return start(place, fault, "train", *arguments, module="tests.support.faulty_process")


def checkpoints(place: Path, run: str) -> list[str]:
    return sorted(path.name for path in (place / "runs" / run / "checkpoints").glob("step-*"))


def assert_stopped_with_checkpoint(place: Path, run: str) -> None:
    last = steps(place, run)[-1]["step"]
    assert checkpoint_bytes(place, run, last)
    ended = {"event": "FitEnded", "ending": "stopped", "step": last}
    assert events(place, run)[-1] == events(place, run)[-1] | ended


def assert_goes_on(place: Path, run: str) -> None:
    """The run takes a few steps more from its last checkpoint."""
    longer = f"training.max_steps={steps(place, run)[-1]['step'] + 4}"
    done = sft(place, "resume", run, "--set", longer, "--allow-change", "training.max_steps")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "code", "to"),
    [
        ("SIGTERM", 143, None),
        ("SIGTERM", 143, 1),
        ("SIGINT", 130, None),
        ("SIGINT", 130, 1),
        ("SIGUSR1", 75, None),
        ("SIGUSR1", 75, 0),
    ],
)
def test_signal_to_one_process_or_all_stops_all_at_one_step_with_a_checkpoint(
    place, parallel, name, code, to
):
    run = f"stop-{parallel}-{name}-{to}"
    launcher = start_two(place, parallel, run)
    ranks = signal_after(place, run, launcher, step=10, number=signal.Signals[name], to=to)
    begin = time.monotonic()
    done = end(launcher)
    assert done.code == code, done.err
    assert time.monotonic() - begin < SECONDS
    assert_stopped_with_checkpoint(place, run)
    assert done.err.count("sft resume") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_save_signal_to_one_process_saves_and_all_go_on(place, parallel):
    run = f"usr2-{parallel}"
    launcher = start_two(place, parallel, run, "checkpoint.every_steps=0")
    signal_after(place, run, launcher, step=10, number=signal.SIGUSR2, to=1)
    wait_until(launcher, lambda: any(event["event"] == "CheckpointSaved" for event in events(place, run)))
    saved = len(steps(place, run))
    signal_after(place, run, launcher, step=saved + 5, number=signal.SIGTERM, to=None)
    assert end(launcher).code == 143


def test_processes_whose_launcher_is_killed_stop_and_save(place, parallel):
    run = f"orphans-{parallel}"
    launcher = start_two(place, parallel, run)
    signal_after(place, run, launcher, step=10, number=signal.SIGKILL, to=None)
    end(launcher)  # its streams close with the last process
    assert_stopped_with_checkpoint(place, run)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_all_with_one_message(place, parallel, rank):
    run = f"killed-{parallel}-{rank}"
    launcher = start_two(place, parallel, run)
    ranks = signal_after(place, run, launcher, step=10, number=signal.SIGKILL, to=rank)
    begin = time.monotonic()
    done = end(launcher)
    assert time.monotonic() - begin < SECONDS
    assert done.code == 71
    assert done.err.count(f"process {rank} of 2 was killed by SIGKILL") == 1
    assert done.err.count("error: ") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    if rank == 1:
        assert_goes_on(place, run)


@pytest.mark.parametrize(
    ("fault", "code", "message", "saved"),
    [
        ("data", 65, "error: row 7 cannot be read", 4),
        ("bug@backward", 1, "TypeError: an error nobody expected", 4),
        ("nans", 4, "error: 3 steps in a row gave no finite loss", 6),
        ("no-memory", 71, "error: out of memory with micro-batches of ", 4),
    ],
    ids=["data", "bug-in-backward", "nans", "no-memory"],
)
def test_error_of_one_process_ends_all_with_its_exit_code_and_one_message(
    place, parallel, fault, code, message, saved
):
    run = f"fault-{parallel}-{fault.replace('@', '-')}"
    launcher = start_faulty(place, parallel, run, fault)
    wait_until(launcher, lambda: len(steps(place, run)) >= GOOD_STEPS)
    begin = time.monotonic()
    done = end(launcher)
    assert time.monotonic() - begin < SECONDS
    assert done.code == code
    assert done.err.count(message) == 1
    assert done.err.count("error: ") == 1
    assert checkpoints(place, run)[-1] == f"step-{saved:08d}"


def test_nan_of_one_process_makes_all_skip_the_step(place, parallel):
    run = f"nan-{parallel}"
    done = end(start_faulty(place, parallel, run, "nan"))
    assert done.code == 0, done.err
    assert [event["applied"] for event in steps(place, run)] == [True] * 4 + [False] + [True] * 3
    assert done.err.count("step 5 skipped") == 1


@pytest.mark.parametrize("fault", ["memory@forward", "memory@backward"])
def test_memory_that_runs_out_in_one_process_is_met_by_all(place, alone, parallel, fault):
    run = f"{fault.replace('@', '-')}-{parallel}"
    done = end(start_faulty(place, parallel, run, fault))
    assert done.code == 0, done.err
    eased = [event for event in events(place, run) if event["event"] == "MemoryEased"]
    assert [(event["step"], event["micro_batch_size"]) for event in eased] == [(5, 1)]
    assert [event["micro_batches"] for event in steps(place, run)] == [3] * 4 + [6] * 4
    ours, theirs = ([event["loss"] for event in steps(place, one)] for one in (run, alone))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_term_to_torchrun_itself_stops_all_with_a_checkpoint(place, parallel):
    run = f"torchrun-{parallel}"
    arguments = flags(place / "model", run, f"training.parallel={parallel}", max_steps=MANY)
    command = ("--nproc-per-node", "2", "-m", "--", "sftcli", "train", *arguments)
    launcher = start(place, *command, module="torch.distributed.run")
    ranks = signal_after(place, run, launcher, step=10, number=signal.SIGTERM, to=None)
    begin = time.monotonic()
    done = end(launcher)
    assert time.monotonic() - begin < SECONDS
    assert done.code != 0
    assert_stopped_with_checkpoint(place, run)
    assert done.err.count(f"sft resume {run}") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
