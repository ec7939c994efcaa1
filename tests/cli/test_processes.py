"""``sft train --processes N``: the same training as that of one process, one voice, and one end for all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from tests.support.several import (
    Ended,
    assert_same_training,
    checkpoint_bytes,
    end,
    events,
    flags,
    sft,
    signal_after,
    start,
    steps,
    train_here,
    wait_until,
    weights,
    write_rows,
)
from tests.support.tiny_model import build_tiny_model
from tests.support.tiny_modern import build_tiny_pt

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
MANY = 100_000  # steps: more than a test waits for
BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])  # ways to share a step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model")
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


def fed(place: Path, run: str, processes: int, *changes: str) -> list[list[list[list[int]]]]:
    """Train, with what each process feeds the model written down: by step, by process, the rows of each pass."""
    folder = place / "fed" / run
    module = "tests.support.recorded_process"
    arguments = flags(place / "model", run, *changes)
    done = end(start(place, str(processes), str(folder), "train", *arguments, module=module))
    assert done.code == 0, done.err
    ranks = [(folder / f"{rank}.jsonl").read_text(encoding="utf-8") for rank in range(processes)]
    return list(zip(*(map(json.loads, text.splitlines()) for text in ranks), strict=True))


@pytest.fixture(scope="module")
def rows_alone(place: Path) -> list[list[int]]:
    """The rows of each step of one process."""
    return [sorted(chain.from_iterable(passes)) for (passes,) in fed(place, "fed-alone", 1)]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("processes", [2, 3])
def test_every_step_feeds_the_rows_that_one_process_feeds(place, alone, rows_alone, processes, parallel):
    run = f"fed-{parallel}-{processes}"
    steps_fed = fed(place, run, processes, f"training.parallel={parallel}")
    for ranks, wanted in zip(steps_fed, rows_alone, strict=True):
        passes = list(chain.from_iterable(ranks))
        if parallel == "fsdp":  # one that is short of a pass computes another's, with weight 0
            passes = [list(rows) for rows in dict.fromkeys(map(tuple, passes))]
        assert sorted(chain.from_iterable(passes)) == wanted
        assert len({len(own) for own in ranks}) == 1 or parallel == "ddp"
    assert all(len(rows) == 6 for rows in rows_alone)
    assert_same_training(place, run, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    {
        "packing": ["training.packing=on"],
        "checkpointing": ["training.gradient_checkpointing=true"],
        "frozen-embeddings": ["training.train_embeddings=false"],
        "early-stopping": ["training.early_stopping_evals=1", "training.eval_every_steps=2"],
    }.items(),
)
def test_ways_to_train_are_the_same_on_two_processes(place, name, changes):
    for run, processes in ((f"{name}-1", "1"), (f"{name}-2", "2")):
        done = sft(place, "train", *flags(place / "model", run, *changes), "--processes", processes)
        assert done.code == 0, done.err
    assert_same_training(place, f"{name}-2", f"{name}-1")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_adapter_is_the_same_on_two_processes_and_only_its_gradients_travel(place):
    for run, processes in (("lora-1", "1"), ("lora-2", "2")):
        done = sft(place, "train", *flags(place / "model", run), "--lora", "--processes", processes)
        assert done.code == 0, done.err
    file = "final/adapter_model.safetensors"
    assert_same_training(place, "lora-2", "lora-1", file)
    predicted = 4 * sum(tensor.numel() for tensor in weights(place, "lora-2", file).values())
    assert {event["exchanged_bytes"] for event in steps(place, "lora-2")} == {predicted}


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_limit_that_is_broken_on_two_processes_is_3_and_told_once(place, alone):
    done = sft(place, "eval", alone, "--no-base", "--fail-above", "loss=0.01", "--processes", "2")
    assert done.code == 3
    assert done.err.count("error: ") == 1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "process 1 was started with run.name own-1, and process 0 with own-0" in ended[0].err
    assert not (place / "runs" / "own-1").exists()


def start_two(place: Path, run: str, parallel: str) -> subprocess.Popen[str]:
    """Start a training that goes on until it is stopped."""
    arguments = flags(place / "model", run, f"training.parallel={parallel}", max_steps=MANY)
    return start(place, "train", *arguments, "--processes", "2")


def train_with_fault(place: Path, run: str, fault: str, parallel: str) -> Ended:
    """Train on two processes, of which the second has a fault."""
    arguments = flags(place / "model", run, f"training.parallel={parallel}")
    return end(start(place, fault, "train", *arguments, module="tests.support.faulty_process"))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("name", "to", "code"),
    [
        ("SIGTERM", None, 143),
        ("SIGINT", None, 130),
        ("SIGUSR1", None, 75),
        ("SIGTERM", 1, 143),
        ("SIGTERM", 0, 143),
    ],
)
def test_signal_to_one_process_stops_all_at_one_step_with_a_checkpoint(place, name, to, code, parallel):
    run = f"stop-{name}-{to}-{parallel}"
    launcher = start_two(place, run, parallel)
    ranks = signal_after(place, run, launcher, step=10, number=signal.Signals[name], to=to)
    begin = time.monotonic()
    done = end(launcher)
    assert done.code == code, done.err
    assert time.monotonic() - begin < 10
    last = steps(place, run)[-1]["step"]
    assert checkpoint_bytes(place, run, last)
    assert events(place, run)[-1] == events(place, run)[-1] | {
        "event": "FitEnded",
        "ending": "stopped",
        "step": last,
    }
    assert done.err.count("sft resume") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
@BOTH
def test_term_to_torchrun_stops_all_at_one_step_with_a_checkpoint(place, parallel):
    run = f"torchrun-term-{parallel}"
    arguments = flags(place / "model", run, f"training.parallel={parallel}", max_steps=MANY)
    command = ("--nproc-per-node", "2", "-m", "--", "sftcli", "train", *arguments)
    launcher = start(place, *command, module="torch.distributed.run")
    ranks = signal_after(place, run, launcher, step=10, number=signal.SIGTERM, to=None)
    begin = time.monotonic()
    done = end(launcher)
    assert done.code != 0
    assert time.monotonic() - begin < 10
    last = steps(place, run)[-1]["step"]
    assert checkpoint_bytes(place, run, last)
    assert events(place, run)[-1]["ending"] == "stopped"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_save_signal_to_one_process_saves_and_all_go_on(place):
    arguments = flags(place / "model", "usr2", "checkpoint.every_steps=0", max_steps=MANY)
    launcher = start(place, "train", *arguments, "--processes", "2")
    signal_after(place, "usr2", launcher, step=10, number=signal.SIGUSR2, to=1)
    wait_until(launcher, lambda: any(event["event"] == "CheckpointSaved" for event in events(place, "usr2")))
    saved = len(steps(place, "usr2"))
    signal_after(place, "usr2", launcher, step=saved + 5, number=signal.SIGTERM, to=None)
    assert end(launcher).code == 143


@pytest.mark.slow
@BOTH
def test_processes_whose_launcher_is_killed_stop_and_save(place, parallel):
    run = f"orphans-{parallel}"
    launcher = start_two(place, run, parallel)
    signal_after(place, run, launcher, step=10, number=signal.SIGKILL, to=None)
    end(launcher)  # its streams close with the last process
    assert events(place, run)[-1]["event"] == "FitEnded"
    last = steps(place, run)[-1]["step"]
    assert checkpoint_bytes(place, run, last)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_all_with_one_message(place, rank, parallel):
    run = f"killed-{rank}-{parallel}"
    launcher = start_two(place, run, parallel)
    ranks = signal_after(place, run, launcher, step=10, number=signal.SIGKILL, to=rank)
    begin = time.monotonic()
    done = end(launcher)
    assert time.monotonic() - begin < 10
    assert done.code == 71
    assert done.err.count(f"process {rank} of 2 was killed by SIGKILL") == 1
    assert done.err.count("error: ") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    longer = f"training.max_steps={steps(place, run)[-1]['step'] + 4}"
    changes = ["--set", longer, "--allow-change", "training.max_steps"]
    assert sft(place, "resume", run, *changes).code == 0


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("data", 65, "error: row 7 cannot be read"),
        ("bug", 1, "TypeError: an error nobody expected"),
        ("nans", 4, "error: 3 steps in a row gave no finite loss"),
        ("no-memory", 71, "error: out of memory with micro-batches of 1 row"),
    ],
)
def test_error_of_one_process_ends_all_with_its_exit_code_and_one_message(
    place, fault, code, message, parallel
):
    run = f"fault-{fault}-{parallel}"
    done = train_with_fault(place, run, fault, parallel)
    assert done.code == code, done.err
    assert done.err.count(message) == 1
    assert done.err.count("error: ") == 1
    assert steps(place, run)
    last_told = (place / "runs" / run / "events.jsonl").stat().st_mtime  # of the step before the fault
    assert time.time() - last_told < 10
    assert len(list((place / "runs" / run / "checkpoints").glob("step-*"))) >= 1


@pytest.mark.slow
@BOTH
def test_nan_of_one_process_makes_all_skip_the_step(place, parallel):
    run = f"nan-{parallel}"
    done = train_with_fault(place, run, "nan", parallel)
    assert done.code == 0, done.err
    assert sum(not event["applied"] for event in steps(place, run)) == 1
    assert len(steps(place, run)) == 8
    assert done.err.count(" skipped") == 1


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_makes_all_take_smaller_passes(place, alone):
    done = train_with_fault(place, "memory", "memory", "ddp")
    assert done.code == 0, done.err
    eased = [event for event in events(place, "memory") if event["event"] == "MemoryEased"]
    assert [(event["step"], event["micro_batch_size"]) for event in eased] == [(5, 1)]
    assert [event["passes"] for event in steps(place, "memory")] == [3] * 4 + [6] * 4
    ours, theirs = ([event["loss"] for event in steps(place, run)] for run in ("memory", alone))
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.fixture(scope="module")
def saved(place: Path) -> dict[int, str]:
    """Whole runs with dropout on one and two processes, with a checkpoint of every second step."""
    for size in (1, 2):
        arguments = [*flags(place / "dropout", f"whole-{size}"), "--processes", str(size)]
        assert sft(place, "train", *arguments).code == 0
    return {1: "whole-1", 2: "whole-2"}


@pytest.mark.slow
def test_resume_on_as_many_processes_is_equal_bit_for_bit(place, saved):
    shutil.copytree(place / "runs" / saved[2], place / "runs" / "again")
    done = sft(place, "resume", "again", "--checkpoint", "4")
    assert done.code == 0, done.err
    assert "bit for bit" not in done.err
    assert checkpoint_bytes(place, "again", 8) == checkpoint_bytes(place, saved[2], 8)


@pytest.mark.slow
def test_replay_of_a_run_on_two_processes_compares_the_random_states_of_both(place, saved):
    done = sft(place, "resume", saved[2], "--verify", "--checkpoint", "4", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["second"] == 6
    alone = sft(place, "resume", saved[1], "--verify", "--checkpoint", "4", "--json")
    more = json.loads(done.out)["tensors"] - json.loads(alone.out)["tensors"]
    assert more == 3  # of Python, numpy and torch


@pytest.mark.slow
def test_dropout_of_processes_differs(place, saved):
    assert steps(place, saved[1])[0]["loss"] != pytest.approx(steps(place, saved[2])[0]["loss"], abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_run_goes_on_with_any_number_of_processes(place, alone, before, after):
    run = f"from-{before}-to-{after}"
    assert sft(place, "train", *flags(place / "model", run), "--processes", str(before)).code == 0
    done = sft(place, "resume", run, "--checkpoint", "4", "--processes", str(after))
    assert done.code == 0, done.err
    assert f"processes was {before}, is {after}: the run goes on, but not bit for bit" in done.err
    assert len(steps(place, run)) == 8
    assert_same_training(place, run, alone)
    back = sft(place, "resume", run, "--checkpoint", "6", "--processes", str(before))
    assert back.code == 0, back.err
    assert_same_training(place, run, alone)
