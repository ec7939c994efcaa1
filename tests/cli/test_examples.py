"""The scripts under examples/, run as they are on the tiny model."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.scripts
REPO = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose ``sft`` is this source tree, and whose ``scontrol`` writes down what it was asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("sft", f'exec {sys.executable} -m sftcli "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}


def small(model: Path, *more: str) -> list[str]:
    sets = ("training.batch_size=8", "data.heldout_fraction=0.2", *more)
    return ["--model", str(model), *(word for text in sets for word in ("--set", text))]


def run(script: str, *arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(REPO / "examples" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_local_shows_trains_scores_and_asks(rows, tiny_model, environment, tmp_path):
    # `prepare` knows no steps: the script's flags are those that both commands take.
    done = run(
        "local.sh", str(rows), *small(tiny_model, "training.max_steps=2"), cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "runs/local/final" in done.stdout
    assert "loss" in done.stdout


def test_a_sweep_names_the_best_rate(rows, tiny_model, environment, tmp_path):
    flags = small(tiny_model, "training.max_steps=2")
    done = run("sweep.sh", str(rows), "1e-6 1e-2", *flags, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "best: rate-1e-2"


def test_a_sweep_prints_no_result_of_an_earlier_one(rows, tiny_model, environment, tmp_path):
    def sweep(rates: str, steps: int):
        flags = small(tiny_model, f"training.max_steps={steps}")
        return run("sweep.sh", str(rows), rates, *flags, cwd=tmp_path, env=environment)

    assert sweep("1e-2", 2).returncode == 0
    other = sweep("1e-6", 2)
    assert [line.split()[0] for line in other.stdout.splitlines()] == ["rate-1e-6", "best:"]
    longer = sweep("1e-6", 3)
    assert (longer.returncode, longer.stdout) == (78, "")
    assert "training.max_steps was 2, is 3" in longer.stderr


def test_a_night_that_is_not_good_enough_changes_nothing(rows, tiny_model, environment, tmp_path):
    flags = small(tiny_model, "training.max_steps=2")
    bad = run("nightly.sh", str(rows), "best", "0.001", *flags, cwd=tmp_path, env=environment)
    assert bad.returncode == 3, bad.stderr
    assert not (tmp_path / "best").exists()
    good = run("nightly.sh", str(rows), "best", "1000", *flags, cwd=tmp_path, env=environment)
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "best" / "config.json").is_file()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_job_out_of_time_goes_back_into_the_queue_and_ends_when_it_runs_again(
    rows, tiny_model, environment, tmp_path
):
    flags = small(
        tiny_model, "training.max_steps=400", "checkpoint.every_steps=0", "training.eval_every_steps=0"
    )
    command = [str(REPO / "examples" / "slurm.sh"), str(rows), *flags]
    job = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    wait_for_a_step(tmp_path / "runs" / "slurm-7" / "events.jsonl")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "scontrol.txt").read_text(encoding="utf-8") == "requeue 7\n"
    assert (
        subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False
        ).returncode
        == 0
    )
    assert (tmp_path / "runs" / "slurm-7" / "final" / "config.json").is_file()


def wait_for_a_step(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.is_file() or '"StepDone"' not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
