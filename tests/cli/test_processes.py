"""``sft train --processes N``: the same training as that of one process, one voice, and one end for all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.several import (
    assert_same_training,
    checkpoint_bytes,
    end,
    flags,
    make_place,
    sft,
    start,
    steps,
    train_here,
    weights,
)
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt

pytestmark = (
    pytest.mark.slow
)  # each process reads all libraries; `tests/equivalence` has a fast test of the same


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("processes"))
    build_tiny_model(folder / "dropout", dropout=0.1)
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> str:
    train_here(place, place / "model", "alone")
    return "alone"


def test_two_processes_train_as_one_and_speak_with_one_voice(place, alone):
    done = sft(place, "train", *flags(place / "model", "two"), "--processes", "2")
    assert done.code == 0
    assert done.out == "runs/two/final\n"
    assert done.err.count("training finished at step 8") == 1
    assert "2 processes share each step" in done.err
    assert_same_training(place, "two", alone)
    predicted = 4 * sum(tensor.numel() for tensor in weights(place, "two").values())
    assert [event["exchanged_bytes"] for event in steps(place, "two")] == [predicted] * 8
    assert [event["exchanged_bytes"] for event in steps(place, alone)] == [0] * 8


def test_processes_that_share_the_weights_out_train_as_one_and_go_on_as_any_number(place, alone):
    shared = "training.parallel=fsdp"
    done = sft(place, "train", *flags(place / "model", "shared", shared), "--processes", "2")
    assert done.code == 0, done.err
    assert "2 processes share each step and the weights" in done.err
    assert_same_training(place, "shared", alone)
    assert weights(place, "shared").keys() == weights(place, alone).keys()
    for processes, way in (("3", "fsdp"), ("1", "fsdp"), ("2", "ddp")):
        more = ("--processes", processes, "--set", f"training.parallel={way}")
        done = sft(place, "resume", "shared", "--checkpoint", "4", *more)
        assert done.code == 0, done.err
        assert_same_training(place, "shared", alone)


@pytest.mark.parametrize("kind", ["lora", "pt"])
def test_adapter_and_pt_model_are_the_same_where_weights_are_shared_out(place, kind):
    if kind == "lora":
        model, more, file = place / "model", ["--lora"], "final/adapter_model.safetensors"
    else:
        model, file = build_tiny_pt(place / "shared.pt"), "final/model.safetensors"
        more = ["--tokenizer", str(place / "model")]
    for run, processes in ((f"{kind}-alone", "1"), (f"{kind}-shared", "2")):
        arguments = [*flags(model, run, "training.parallel=fsdp"), *more, "--processes", processes]
        done = sft(place, "train", *arguments)
        assert done.code == 0, done.err
    assert_same_training(place, f"{kind}-shared", f"{kind}-alone", file)


def test_adapter_is_the_same_on_two_processes_and_only_its_gradients_travel(place):
    for run, processes in (("lora-1", "1"), ("lora-2", "2")):
        done = sft(place, "train", *flags(place / "model", run), "--lora", "--processes", processes)
        assert done.code == 0, done.err
    file = "final/adapter_model.safetensors"
    assert_same_training(place, "lora-2", "lora-1", file)
    predicted = 4 * sum(tensor.numel() for tensor in weights(place, "lora-2", file).values())
    assert {event["exchanged_bytes"] for event in steps(place, "lora-2")} == {predicted}


def test_pt_model_is_the_same_on_two_processes_and_leaves_its_files_once(place):
    model = build_tiny_pt(place / "tiny.pt")
    for run, processes in (("pt-1", "1"), ("pt-2", "2")):
        arguments = [*flags(model, run), "--tokenizer", str(place / "model"), "--processes", processes]
        done = sft(place, "train", *arguments)
        assert done.code == 0, done.err
    assert_same_training(place, "pt-2", "pt-1")
    names = [sorted(path.name for path in (place / "runs" / run).glob("*.pt")) for run in ("pt-1", "pt-2")]
    assert [name.replace("pt-1", "pt-2") for name in names[0]] == names[1]
    assert len(names[1]) >= 2


def test_scores_of_two_processes_are_those_of_one(place, alone):
    reports = []
    for processes in ("1", "2"):
        done = sft(place, "eval", alone, "--json", "--processes", processes)
        assert done.code == 0, done.err
        reports.append(json.loads(done.out))
        for score in ("tuned", "base"):
            reports[-1][score].pop("seconds")
    for score in ("tuned", "base"):
        assert reports[1][score].pop("loss") == pytest.approx(reports[0][score].pop("loss"), abs=1e-6)
    assert reports[1] == reports[0]


def test_limit_that_is_broken_on_two_processes_is_3_and_told_once(place, alone):
    done = sft(place, "eval", alone, "--no-base", "--fail-above", "loss=0.01", "--processes", "2")
    assert done.code == 3
    assert done.err.count("error: ") == 1


def test_torchrun_starts_it_as_it_is(place, alone):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "sftcli", "train"]
    done = subprocess.run(
        [sys.executable, *command, *flags(place / "model", "torchrun")],
        cwd=place, capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"SFT_CACHE_DIR": str(place / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/torchrun/final\n"
    assert_same_training(place, "torchrun", alone)


def test_tasks_of_srun_find_each_other(place, alone):
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
           "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}  # fmt: skip
    tasks = [
        start(
            place,
            "train",
            *flags(place / "model", "slurm"),
            **job,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
        )
        for rank in range(2)
    ]
    ended = [end(task) for task in tasks]
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert ended[0].out == "runs/slurm/final\n"
    assert (ended[1].out, ended[1].err) == ("", "")
    assert_same_training(place, "slurm", alone)


def test_tasks_that_were_started_for_trainings_of_their_own_are_refused(place):
    job = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid() + 1),
    }
    tasks = [
        start(
            place,
            "train",
            *flags(place / "model", f"own-{rank}"),
            **job,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID="0",
        )
        for rank in range(2)
    ]
    ended = [end(task) for task in tasks]
    assert [one.code for one in ended] == [78, 78]
    assert "process 1 was started with run.name own-1, but process 0 with own-0" in ended[0].err
    assert not (place / "runs" / "own-1").exists()


@pytest.fixture(scope="module")
def saved(place: Path) -> dict[int, str]:
    """Whole runs with dropout on one and two processes, with a checkpoint of every second step."""
    for size in (1, 2):
        arguments = [*flags(place / "dropout", f"whole-{size}"), "--processes", str(size)]
        assert sft(place, "train", *arguments).code == 0
    return {1: "whole-1", 2: "whole-2"}


def test_resume_on_as_many_processes_is_equal_bit_for_bit(place, saved):
    shutil.copytree(place / "runs" / saved[2], place / "runs" / "again")
    done = sft(place, "resume", "again", "--checkpoint", "4")
    assert done.code == 0, done.err
    assert "bit for bit" not in done.err
    assert checkpoint_bytes(place, "again", 8) == checkpoint_bytes(place, saved[2], 8)


def test_replay_of_a_run_on_two_processes_compares_the_random_states_of_both(place, saved):
    done = sft(place, "resume", saved[2], "--verify", "--checkpoint", "4", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["second"] == 6
    alone = sft(place, "resume", saved[1], "--verify", "--checkpoint", "4", "--json")
    more = json.loads(done.out)["tensors"] - json.loads(alone.out)["tensors"]
    assert more == 3  # of Python, numpy and torch


def test_dropout_of_processes_differs(place, saved):
    assert steps(place, saved[1])[0]["loss"] != pytest.approx(steps(place, saved[2])[0]["loss"], abs=1e-7)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_run_goes_on_with_any_number_of_processes(place, alone, before, after):
    run = f"from-{before}-to-{after}"
    assert sft(place, "train", *flags(place / "model", run), "--processes", str(before)).code == 0
    done = sft(place, "resume", run, "--checkpoint", "4", "--processes", str(after))
    assert done.code == 0, done.err
    assert f"processes was {before}, is {after}: the run continues, but not bit for bit" in done.err
    assert len(steps(place, run)) == 8
    assert_same_training(place, run, alone)
    back = sft(place, "resume", run, "--checkpoint", "6", "--processes", str(before))
    assert back.code == 0, back.err
    assert_same_training(place, run, alone)
