"""A run without a checkpoint starts over from what it recorded, and a finished one is what was asked for, or refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.config.resolve import parse_set
from sftcli.errors import DataError, MismatchError, NotFoundError, OutputError
from sftcli.events import CheckpointSaved, Ending, Notice, Session, StepDone
from sftcli.services.runs.folder import RunFolder, find_run, list_runs, newest_run
from sftcli.services.runs.summary import RunState, summarize_run, summarize_runs
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.services.train.run import TrainingRun
from sftcli.training.trainer import Trainer
from tests.support.runs import StopAtStep, copied_here, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

NEVER, STEPS = 99, 5
RARE = ("checkpoint.every_steps=0", f"training.max_steps={STEPS}")


class KillAtStep(StopAtStep):
    """Ends as a kill would: nothing is saved or said after the step."""

    def __call__(self, event) -> None:
        super().__call__(event)
        if isinstance(event, StepDone) and event.step == self.step:
            raise KeyboardInterrupt

    def requested(self) -> bool:
        return False


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole`` is finished, ``cut`` was killed after step 3 and has no checkpoint."""
    folder = tmp_path_factory.mktemp("over")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model", dropout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        train(settings("whole"), StopAtStep(NEVER))
        with pytest.raises(KeyboardInterrupt):
            train(settings("cut"), KillAtStep(3))
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied_here(origin, tmp_path, monkeypatch)


def settings(name: str, *changes: str):
    return settings_of(Path(), Path("model"), f"run.name={name}", *RARE, *changes)


def resume(name: str, *sets: str, allowed: tuple[str, ...] = ()):
    flag = StopAtStep(NEVER)
    request = ResumeRequest(
        root=Path("runs"), run=name, overrides=tuple(map(parse_set, sets)), allowed=allowed
    )
    return resume_training(request, Session(flag, flag)), "\n".join(
        e.text for e in flag.events if isinstance(e, Notice)
    )


def test_run_without_a_checkpoint_starts_over_and_ends_as_one_that_was_never_killed(place):
    run, whole = RunFolder(place / "runs" / "cut"), place / "runs" / "whole"
    origins, about = run.origins.read_bytes(), run.record()
    assert summarize_run(run).state is RunState.BROKEN_OFF
    outcome, told = resume("cut")
    assert outcome.ending is Ending.FINISHED
    assert "no checkpoint yet: starting over from the recorded settings" in told
    assert tensors_of(run.path, STEPS) == tensors_of(whole, STEPS)
    assert (run.final / "model.safetensors").read_bytes() == (
        whole / "final" / "model.safetensors"
    ).read_bytes()
    assert numbers_of(run.path) == numbers_of(whole)
    assert run.origins.read_bytes() == origins
    after = run.record()
    assert replace(after, resumed=()) == about
    assert [entry.step for entry in after.resumed] == [0]


def test_auto_starts_it_over_as_well(place):
    about = RunFolder(place / "runs" / "cut").record()
    assert train(settings("cut"), StopAtStep(NEVER), auto=True).ending is Ending.FINISHED
    assert RunFolder(place / "runs" / "cut").record().started_at == about.started_at
    assert tensors_of(place / "runs" / "cut", STEPS) == tensors_of(place / "runs" / "whole", STEPS)


def test_starting_over_takes_no_other_settings_and_no_other_rows(place):
    with pytest.raises(MismatchError, match=r"training\.learning_rate was 0\.01, is 0\.02"):
        resume("cut", "training.learning_rate=0.02")
    rows = place / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is 6.", "It is 7."))
    with pytest.raises(MismatchError, match="data was sha256"):
        resume("cut")
    outcome, _ = resume("cut", "checkpoint.keep_last=5", allowed=("data",))
    assert outcome.ending is Ending.FINISHED


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_auto_on_a_finished_run_refuses_other_settings_and_other_rows(place, has_checkpoint):
    run = RunFolder(place / "runs" / "whole")
    if not has_checkpoint:
        shutil.rmtree(run.checkpoints)
    final = (run.final / "model.safetensors").read_bytes()
    assert train(settings("whole"), StopAtStep(NEVER), auto=True).step == STEPS
    with pytest.raises(MismatchError, match=r"training\.seed was 0, is 5"):
        train(settings("whole", "training.seed=5"), StopAtStep(NEVER), auto=True)
    rows = place / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is 6.", "It is 7."))
    with pytest.raises(MismatchError, match="data was sha256"):
        train(settings("whole"), StopAtStep(NEVER), auto=True)
    assert (run.final / "model.safetensors").read_bytes() == final


def test_folder_of_a_start_that_was_killed_at_once_is_no_obstacle(place):
    (place / "runs" / "new").mkdir()
    with pytest.raises(NotFoundError, match="was killed before its settings were saved") as caught:
        resume("new")
    assert "sft train --run new --resume auto" in caught.value.hint
    assert train(settings("new"), StopAtStep(NEVER)).ending is Ending.FINISHED
    with pytest.raises(OutputError, match="exists already"):
        train(settings("new"), StopAtStep(NEVER))


def test_run_that_lost_its_settings_names_its_command(place):
    (place / "runs" / "cut" / "config.toml").unlink()
    with pytest.raises(NotFoundError, match=r"lacks config\.toml") as caught:
        resume("cut")
    assert "its command was: sft train" in caught.value.hint


def test_start_that_was_killed_before_it_had_a_name_is_no_run(place):
    unnamed = storage.scratch_path(place / "runs", storage.TEMPORARY)
    shutil.copytree(place / "runs" / "cut", unnamed)
    assert [run.name for run in list_runs(place / "runs")] == ["cut", "whole"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_one_damaged_run_does_not_stop_commands_on_others(place, content):
    (place / "runs" / "bad").mkdir()
    (place / "runs" / "bad" / "run.json").write_bytes(content)
    root = place / "runs"
    assert [run.name for run in list_runs(root)] == ["cut", "whole", "bad"]
    assert [(one.name, one.state) for one in summarize_runs(root)][-1] == ("bad", RunState.DAMAGED)
    assert newest_run(root, finished=False).name == "cut"
    assert find_run("whole", root).is_finished
    with pytest.raises(DataError, match=r"bad/run\.json is damaged"):
        summarize_run(find_run("bad", root))


class Ticking:
    """A clock on which each look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_checkpoints_by_the_clock_move_no_number(place, monkeypatch, in_background):
    class Clocked(Trainer):
        def __init__(self, **parts) -> None:
            super().__init__(**parts, clock=Ticking())

    monkeypatch.setattr(TrainingRun, "trainer_type", Clocked)
    flag = StopAtStep(NEVER)
    changes = (
        "checkpoint.every_minutes=0.1",
        f"checkpoint.in_background={in_background}",
        "checkpoint.keep_last=9",
    )
    assert train(settings(f"timed-{in_background}", *changes), flag).ending is Ending.FINISHED
    saved = [event.step for event in flag.events if isinstance(event, CheckpointSaved)]
    assert 2 <= len(saved) <= STEPS
    assert saved[-1] == STEPS
    run = place / "runs" / f"timed-{in_background}"
    assert numbers_of(run) == numbers_of(place / "runs" / "whole")
    assert tensors_of(run, STEPS) == tensors_of(place / "runs" / "whole", STEPS)


def test_rhythm_of_checkpoints_is_told_at_the_start(place):
    for name, change, text in (
        ("a", "checkpoint.every_minutes=10", "a checkpoint is saved every 10 minutes, and at the end"),
        ("b", "checkpoint.every_minutes=0", "a checkpoint is saved at the end only"),
        (
            "c",
            "checkpoint.every_steps=2",
            "a checkpoint is saved every 2 steps, every 10 minutes, and at the end",
        ),
    ):
        flag = StopAtStep(NEVER)
        train(settings(name, "training.max_steps=3", change), flag)
        assert text in "\n".join(event.text for event in flag.events if isinstance(event, Notice))
