"""The law of a training that is given a time: it is, bit for bit, the one that is given the steps that the time was turned into."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from sftcli.config.resolve import parse_set, resolve
from sftcli.config.schema.training import TrainingSettings
from sftcli.errors import StoppedError, UsageError
from sftcli.events import Ending, NeverStop, Session
from sftcli.runtime import monotonic
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.train.lead import TrainRequest, run_training
from sftcli.services.train.resume import ResumeRequest, resume_training
from sftcli.training.optim.schedule import learning_rate_at
from sftcli.training.probes.pace import leaving_nothing, time_steps
from tests.support.recording import MemoryStore, RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.several import FLAGS, make_place, train_together
from tests.support.tiny_model import build_tiny_model
from tests.support.training import build_trainer

NEVER = 10**9
HOUR = "training.max_minutes=60"  # thousands of tiny steps
LORA = ("adapter.kind=lora", "adapter.rank=4", "adapter.dropout=0.2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("budget")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model", dropout=0.2)
    return folder


@pytest.fixture(autouse=True)
def _shared_cache(place, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def resolved_of(place: Path, run: str, *changes: str):
    return settings_of(place, place / "model", f"run.name={run}", *changes)


def about(place: Path, run: str) -> dict:
    return json.loads((place / "runs" / run / "run.json").read_text(encoding="utf-8"))


def resume(place: Path, run: str, stop_at: int = NEVER):
    flag = StopAtStep(stop_at)
    return resume_training(ResumeRequest(root=place / "runs", run=run), Session(flag, flag))


@pytest.mark.parametrize("form", [(), LORA], ids=["full", "lora"])
def test_time_that_is_never_reached_changes_nothing(place, form):
    """The epochs end it: what was measured at the start has left no trace."""
    kind = "lora" if form else "full"
    train(resolved_of(place, f"{kind}-plain", *form), StopAtStep(NEVER))
    train(resolved_of(place, f"{kind}-timed", HOUR, *form), StopAtStep(NEVER))
    plain, timed = (place / "runs" / f"{kind}-{name}" for name in ("plain", "timed"))
    assert numbers_of(timed) == numbers_of(plain)
    assert tensors_of(timed, 10) == tensors_of(plain, 10)
    budget = about(place, timed.name)["budget"]
    assert (budget["steps"], budget["decided_by"]) == (10, "training.epochs")
    assert budget["allowed"] > 10
    assert 0 < budget["used_seconds"] < 3600


def test_fewer_of_steps_and_time_end_the_training_by_name(place):
    sink = StopAtStep(NEVER)
    outcome = train(resolved_of(place, "capped", HOUR, "training.max_steps=3"), sink)
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, 3)
    assert about(place, "capped")["budget"]["decided_by"] == "training.max_steps"
    assert any("training.max_steps ends the training after 3 steps" in str(event) for event in sink.events)


def test_steps_are_fixed_once_and_the_schedule_ends_with_them(place):
    """Nobody chose epochs: time alone decides. Stopped and resumed it is the run that was given the steps from the start."""
    train(resolved_of(place, "cut", HOUR, "training.epochs=none"), StopAtStep(3))
    steps = about(place, "cut")["budget"]["steps"]
    assert about(place, "cut")["budget"]["decided_by"] == "training.max_minutes"
    settings = read_settings(RunFolder(place / "runs" / "cut")).training
    assert (settings.max_steps, settings.max_minutes) == (steps, None)
    assert resume(place, "cut", stop_at=6).last_step == steps
    assert about(place, "cut")["budget"]["steps"] == steps
    train(resolved_of(place, "given", "training.epochs=none", f"training.max_steps={steps}"), StopAtStep(6))
    cut, given = (place / "runs" / name for name in ("cut", "given"))
    assert numbers_of(cut) == numbers_of(given)
    assert tensors_of(cut, 6) == tensors_of(given, 6)
    rates = [event["learning_rate"] for event in numbers_of(cut) if event["event"] == "StepDone"]
    assert rates == [learning_rate_at(step, settings) for step in range(6)]
    assert learning_rate_at(steps, settings) == 0


def test_the_same_command_goes_on_with_the_steps_that_were_counted(place):
    asked = resolved_of(place, "auto", HOUR, "training.epochs=none")
    train(asked, StopAtStep(2), auto=True)
    steps = about(place, "auto")["budget"]["steps"]
    assert train(asked, StopAtStep(4), auto=True).last_step == steps


def test_start_that_was_stopped_while_it_measured_measures_again(place):
    with pytest.raises(StoppedError):
        train(resolved_of(place, "unstarted", HOUR, "training.epochs=none"), StopAtStep(0))
    assert "budget" not in about(place, "unstarted")
    assert resume(place, "unstarted", stop_at=2).last_step == about(place, "unstarted")["budget"]["steps"]


def test_time_in_which_no_step_fits_is_refused(place):
    request = TrainRequest(
        resolved=resolved_of(place, "short", "training.max_minutes=1"), label="run", command="sft train",
        begun=monotonic() - 3600,
    )  # fmt: skip
    with pytest.raises(UsageError, match="1m00s is too short: a training of one step takes about"):
        run_training(request, Session(RecordingSink(), NeverStop()))
    assert not (place / "runs" / "short").exists()


def test_time_shorter_than_the_warm_up_is_refused(place):
    with pytest.raises(UsageError, match="60 minutes are 10 steps"):
        train(resolved_of(place, "warm", HOUR, "training.warmup_steps=11"), StopAtStep(NEVER))


def test_time_cannot_change_when_a_run_goes_on(place):
    train(resolved_of(place, "changed"), StopAtStep(2))
    override = parse_set("training.max_minutes=5")
    request = ResumeRequest(
        root=place / "runs", run="changed", overrides=(override,), allowed=("training.max_minutes",)
    )
    with pytest.raises(UsageError, match="max_minutes, so it cannot change"):
        resume_training(request, Session(RecordingSink(), NeverStop()))


def last_step_here(place: Path) -> None:
    """Train for three steps of an hour, and write down at which step this process would have ended."""
    sets = (*FLAGS, HOUR, f"run.root={place / 'runs'}", "run.name=two", f"model.name={place / 'model'}")
    rows = f"data.sources={place / 'rows.jsonl'}"
    resolved = resolve(
        preset=None, config_file=None, overrides=tuple(map(parse_set, (*sets, rows))), environ={}
    )
    flag = StopAtStep(3)
    request = TrainRequest(resolved=resolved, label="run", command="sft train")
    outcome = run_training(request, Session(flag, flag))
    (place / f"last-{os.environ['RANK']}").write_text(str(outcome.last_step), encoding="utf-8")


def test_processes_agree_on_the_steps(tmp_path):
    folder = make_place(tmp_path)
    train_together(partial(last_step_here, folder), size=2)
    steps = about(folder, "two")["budget"]["steps"]
    assert [int((folder / f"last-{rank}").read_text(encoding="utf-8")) for rank in (0, 1)] == [steps, steps]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_trial_steps_leave_nothing(optimizer):
    settings = TrainingSettings(
        max_steps=9,
        batch_size=4,
        micro_batch_size=2,
        learning_rate=1e-2,
        optimizer=optimizer,
        neftune_alpha=5.0,
    )
    trained = []
    for is_tried in (False, True):
        torch.manual_seed(1)
        store, sink = MemoryStore(), RecordingSink()
        trainer = build_trainer(settings=settings, store=store, emit=sink)
        if is_tried:
            with leaving_nothing(trainer):
                assert len(time_steps(trainer, last_step=9, enough=lambda taken: len(taken) == 5)) == 5
        trainer.fit(NeverStop())
        trained.append(store.snapshots[9])
    plain, tried = trained
    assert all(torch.equal(plain.weights[name], tried.weights[name]) for name in plain.weights)
    assert all(torch.equal(plain.optimizer[name], tried.optimizer[name]) for name in plain.optimizer)
    assert plain.state == tried.state
