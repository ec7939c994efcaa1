"""``kill -9`` of ``sft train`` with its default settings, then the command that is printed: the weights of a run that was never killed."""

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.forked import end_forked, start_forked
from tests.support.tiny_model import build_tiny_model

STEPS = 12  # instead of 120; all else that decides when a checkpoint comes is the default
TIMED = ("--set", "checkpoint.every_minutes=0.002")


def start(place: Path, *arguments: str) -> int:
    """Run ``sft`` in a child; its output goes into ``output.txt``."""

    def work() -> None:
        from sftcli.cli.app import main

        sys.argv = ["sft", *arguments]
        with (place / "output.txt").open("w", buffering=1, encoding="utf-8") as file:
            sys.stdout = sys.stderr = file
            main()

    return start_forked(work)


def said(place: Path) -> str:
    return (place / "output.txt").read_text(encoding="utf-8")


def run_whole(place: Path, *arguments: str) -> str:
    assert end_forked(start(place, *arguments)) == 0, said(place)
    return said(place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was never killed, of the default preset on a tiny model."""
    folder = tmp_path_factory.mktemp("default")
    build_tiny_model(folder / "model", dropout=0.1)
    return folder


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))
    if not Path("runs/whole/final").exists():
        run_whole(place, "train", "--model", "model", "--max-steps", str(STEPS), "--run", "whole")


def kill_when(place: Path, child: int, run: Path, moment: str) -> None:
    """Kill the child once the run has come to ``moment``: its folder, a step, or a checkpoint."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = run / "events.jsonl"
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        is_there = {
            "folder": run.exists(),
            "checkpoint": '"CheckpointSaved"' in text,
        }.get(moment, f'"StepDone", "step": {moment},' in text or f'"step": {moment}, "loss"' in text)
        if is_there:
            os.kill(child, signal.SIGKILL)
            assert end_forked(child) == -signal.SIGKILL
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    end_forked(child)
    raise AssertionError(f"{moment} never came: {said(place)}")


def result(run: Path) -> dict[str, object]:
    """Return what a finished run has left, and the numbers of its log."""
    files = [
        run / "final" / "model.safetensors",
        run / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors",
    ]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [
        (event["step"], event["loss"]) for event in events if event["event"] in {"StepDone", "HeldoutDone"}
    ]
    return {"files": [path.read_bytes() for path in files], "numbers": numbers}


def attack(place: Path, name: str, moment: str, *more: str) -> None:
    run = place / "runs" / name
    kill_when(
        place,
        start(place, "train", "--model", "model", "--max-steps", str(STEPS), "--run", name, *more),
        run,
        moment,
    )
    (command,) = re.findall(r"^next: sft (.*)$", run_whole(place, "show", name), re.MULTILINE)
    assert shlex.split(command)[0] == "resume"
    run_whole(place, *shlex.split(command))
    assert result(run) == result(place / "runs" / "whole")
    assert re.search(r"^next: sft eval ", run_whole(place, "show", name), re.MULTILINE)


@pytest.mark.parametrize("moment", ["6"])
def test_killed_default_run_goes_on_with_the_printed_command_to_the_same_weights(place, moment):
    attack(place, f"cut-{moment}", moment)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["folder", "1", "3", "11"])
def test_killed_default_run_at_other_moments(place, moment):
    attack(place, f"cut-{moment}", moment)


@pytest.mark.slow
def test_killed_default_run_with_a_checkpoint_by_the_clock(place):
    attack(place, "timed", "checkpoint", *TIMED)
