"""A start that is killed before any operation on the disk leaves nothing, or a run that ends as if it had never been killed."""

import shutil
import signal
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.events import Session
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resume import ResumeRequest, resume_training
from tests.support.faulty_disk import CountingDisk, KillingDisk
from tests.support.forked import run_forked
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER, STEPS = 99, 2


def begin(name: str):
    changes = (f"run.name={name}", f"training.max_steps={STEPS}", "checkpoint.every_steps=0", "training.eval_every_steps=0",
               "checkpoint.in_background=false")  # fmt: skip
    return train(settings_of(Path(), Path("model"), *changes), StopAtStep(NEVER))


@pytest.mark.parametrize("stride", [15, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_before_any_operation_of_a_start_leaves_nothing_or_a_run_that_ends_as_one_never_killed(
    tmp_path, monkeypatch, stride
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.jsonl", 15)
    build_tiny_model(tmp_path / "model", dropout=0.1)
    begin("warm")  # the cache is filled
    disk = CountingDisk()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "disk", disk)
        begin("whole")
    first_save = [path for _, path in disk.log].index("checkpoints")
    is_there = []
    for at in range(1, first_save + 1, stride):

        def work(at=at):
            storage.disk = KillingDisk(at)
            begin("cut")

        assert run_forked(work) == -signal.SIGKILL
        run = RunFolder(Path("runs/cut"))
        is_there.append(run.path.exists())
        if is_there[-1]:
            assert {"config.toml", "origins.json", "run.json"} <= {path.name for path in run.path.iterdir()}
            flag = StopAtStep(NEVER)
            resume_training(ResumeRequest(root=Path("runs"), run="cut"), Session(flag, flag))
        else:
            begin("cut")
        assert tensors_of(run.path, STEPS) == tensors_of(Path("runs/whole"), STEPS)
        assert numbers_of(run.path) == numbers_of(Path("runs/whole"))
        shutil.rmtree(run.path)
    assert is_there == sorted(is_there)
    assert {True, False} == set(is_there)
