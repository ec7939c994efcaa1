"""The files under ``examples/cluster``, as they are, under stand-ins for Slurm and Kubernetes, with trainings of the tiny model."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.agents import named_host
from tests.support.pods import PyTorchJob, run_of_skypilot
from tests.support.several import FLAGS, assert_same_training, events, make_place, steps, train_here
from tests.support.slurm import SlurmJob, make_programs, with_children

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc"),
    pytest.mark.slow,
]
CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
STEPS = 100
EARLY = 10  # steps before something happens
PORTS = iter(range(20_000 + os.getpid() % 10_000, 32_768))
SECONDS = 280  # that a test waits for something on a busy machine
GENTLE = "training.learning_rate=1e-4"  # at a higher one so many steps carry roundings further than 1e-5
SETTINGS = [word for change in (*FLAGS, GENTLE) for word in ("--set", change)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    train_here(place, place / "model", "alone", GENTLE, max_steps=STEPS)
    return "alone"


def wait_until(is_so: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


def free_port() -> int:
    """Return another port, which no outgoing connection takes: from those a process that waits for the first one may connect to itself."""
    for port in PORTS:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.fixture
def jobs(place: Path) -> Iterator[Callable[[str, str], SlurmJob]]:
    """Make jobs of Slurm of a script and for a run."""
    made: list[SlurmJob] = []

    def make(script: str, run: str) -> SlurmJob:
        arguments = [
            "--data",
            "rows.jsonl",
            "--model",
            str(place / "model"),
            "--run",
            run,
            "--max-steps",
            str(STEPS),
        ]
        number = os.getpid() * 10 + len(list(place.glob("job-*")))  # the port follows from it
        made.append(SlurmJob(CLUSTER / script, [*arguments, *SETTINGS], cwd=place, number=number))
        return made[-1]

    yield make
    for job in made:
        job.end()


def start_until_early(job: SlurmJob, place: Path, run: str) -> None:
    job.start()
    wait_until(lambda: len(steps(place, run)) >= EARLY or not job.is_running(), job.log.read_text)
    assert job.is_running(), job.log.read_text()


def endings(place: Path, run: str) -> list[str]:
    return [event["ending"] for event in events(place, run) if event["event"] == "FitEnded"]


@pytest.mark.parametrize("script", ["slurm.sh", "slurm-torchrun.sh"])
def test_job_of_slurm_out_of_time_saves_goes_back_into_the_queue_and_ends_as_if_it_had_not_stopped(
    place, alone, jobs, script
):
    run = f"time-{script.removesuffix('.sh')}"
    job = jobs(script, run)
    start_until_early(job, place, run)
    job.run_out_of_time()
    assert job.wait(SECONDS) == (0, True), job.log.read_text()
    assert endings(place, run) == ["stopped"]
    job.start()
    assert job.wait(SECONDS) == (0, False), job.log.read_text()
    assert endings(place, run) == ["finished"]
    assert_same_training(place, run, alone)


def test_job_of_slurm_that_loses_a_node_ends_its_step_and_goes_back_into_the_queue(place, alone, jobs):
    job = jobs("slurm.sh", "node")
    start_until_early(job, place, "node")
    job.lose_node(1)
    assert job.wait(SECONDS) == (0, True), job.log.read_text()
    assert endings(place, "node") == []
    job.start()
    assert job.wait(SECONDS) == (0, False), job.log.read_text()
    assert_same_training(place, "node", alone)


def test_job_of_slurm_with_torchrun_finishes_on_the_nodes_that_are_left(place, alone, jobs):
    job = jobs("slurm-torchrun.sh", "left")
    start_until_early(job, place, "left")
    job.lose_node(1 - job.node_that_listens(29500))  # the meeting point has to stay
    assert job.wait(SECONDS) == (0, True), job.log.read_text()
    assert endings(place, "left") == ["finished"]
    assert_same_training(place, "left", alone)
    job.start()
    assert job.wait(SECONDS) == (0, False)
    assert "left is complete already" in job.log.read_text()


def test_job_of_slurm_that_is_wrong_is_not_started_again(place, jobs):
    job = jobs("slurm.sh", "wrong")
    job.command += ["--set", "training.batch_size=0"]
    job.start()
    assert job.wait(SECONDS) == (2, False)


@pytest.mark.parametrize("lost", [0, 1], ids=["master", "worker"])
def test_pod_that_is_lost_is_started_again_and_the_training_goes_on(place, alone, lost):
    run = f"pod-{lost}"
    more = ["--run", run, "--max-steps", str(STEPS), *SETTINGS]
    with PyTorchJob(CLUSTER / "pytorchjob.yaml", place, more, port=free_port()) as job:
        wait_until(lambda: job.keep() or len(steps(place, run)) >= EARLY, job.said)
        job.pods[lost].kill()
        wait_until(job.keep, job.said)
        assert job.pods[lost].restarts >= 1
    assert endings(place, run) == ["finished"]
    assert_same_training(place, run, alone)


def test_task_of_skypilot_that_is_preempted_goes_on_elsewhere(place, alone):
    commands = run_of_skypilot(CLUSTER / "skypilot.yaml", place).replace("29500", str(free_port()))
    commands = commands.rstrip() + f" --run sky --max-steps {STEPS} {' '.join(SETTINGS)}"
    programs = make_programs(place / "bin-sky")

    def start(machines: tuple[str, str]) -> list[subprocess.Popen[str]]:
        variables = {
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_TASK_ID": "sky-managed-7", "SFT_CACHE_DIR": str(place / "cache"),
        }  # fmt: skip
        return [
            subprocess.Popen(
                named_host(name, ["bash", "-c", commands]), cwd=place, text=True, stderr=subprocess.PIPE,
                env=programs | variables | {"SKYPILOT_NODE_RANK": str(rank)}, start_new_session=True,
            )
            for rank, name in enumerate(machines)
        ]  # fmt: skip

    first = start(("east-0", "east-1"))
    wait_until(lambda: len(steps(place, "sky")) >= EARLY, lambda: "no steps")
    for pid in [pid for machine in first for pid in with_children(machine.pid)]:
        os.kill(pid, signal.SIGKILL)
    for machine in first:
        machine.communicate()
    second = start(("west-0", "west-1"))
    said = [machine.communicate(timeout=SECONDS)[1] for machine in second]
    assert [machine.returncode for machine in second] == [0, 0], said
    assert_same_training(place, "sky", alone)
