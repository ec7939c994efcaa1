"""A run that replays rows of an earlier one is as exact as any: stopped and resumed, and in several processes."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from sftcli.data.prepared.store import open_prepared
from sftcli.events import EarlierDone, Ending, Session
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.resume import ResumeRequest, resume_training
from tests.support.runs import StopAtStep, numbers_of, settings_of, tensors_of, train, write_rows
from tests.support.several import train_here, train_together
from tests.support.tiny_model import build_tiny_model

STEPS = 14  # two epochs of 20 rows and 7 replayed ones in steps of 4
NEVER = STEPS + 1
REPLAY = "data.replay=25%"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A folder with an earlier run and an uninterrupted one that goes on from it on other rows."""
    folder = tmp_path_factory.mktemp("training-on")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "more.jsonl", count=40)
    build_tiny_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_CACHE_DIR", str(folder / "cache"))
        train(
            settings_of(folder, folder / "model", "run.name=first", f"data.sources={folder / 'more.jsonl'}"),
            StopAtStep(99),
        )
        train(going_on(folder, "whole"), StopAtStep(NEVER))
    return folder


@pytest.fixture(autouse=True)
def _shared_cache(place, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def going_on(place: Path, name: str):
    return settings_of(place, place / "runs" / "first" / "final", f"run.name={name}", REPLAY)


def resumed(place: Path, name: str) -> Path:
    torch.manual_seed(12345)
    flag = StopAtStep(NEVER)
    outcome = resume_training(ResumeRequest(root=place / "runs", run=name), Session(flag, flag))
    assert (outcome.ending, outcome.step) == (Ending.FINISHED, STEPS)
    assert [kept.run for kept in outcome.earlier] == ["first"]
    return place / "runs" / name


def measured(run: Path) -> list[EarlierDone]:
    return [event for event in read_events(RunFolder(run)) if isinstance(event, EarlierDone)]


@pytest.mark.parametrize("stop_at", [1, 7])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(place, stop_at):
    whole, name = place / "runs" / "whole", f"cut-{stop_at}"
    train(going_on(place, name), StopAtStep(stop_at))
    cut = resumed(place, name)
    assert tensors_of(cut, STEPS) == tensors_of(whole, STEPS)
    assert numbers_of(cut) == numbers_of(whole)
    assert [(event.step, event.is_end) for event in measured(cut)] == [(0, False), (STEPS, True)]


def test_what_becomes_of_the_earlier_rows_does_not_matter_to_a_run_that_has_begun(
    place, tmp_path, monkeypatch
):
    train(going_on(place, "alone"), StopAtStep(5))
    for path in (place / "cache" / "prepared", place / "runs" / "first" / "data.json"):
        path.rename(place / f"{path.name}-aside")
    (place / "more.jsonl").rename(place / "more-aside")
    try:
        cut = resumed(place, "alone")
    finally:
        shutil.rmtree(place / "cache" / "prepared")
        (place / "prepared-aside").rename(place / "cache" / "prepared")
        (place / "data.json-aside").rename(place / "runs" / "first" / "data.json")
        (place / "more-aside").rename(place / "more.jsonl")
    assert numbers_of(cut) == numbers_of(place / "runs" / "whole")


def test_a_damaged_folder_of_earlier_rows_is_made_again_alike(place):
    train(going_on(place, "damaged"), StopAtStep(3))
    (place / "runs" / "damaged" / "earlier" / "train.arrow").write_bytes(b"")
    assert numbers_of(resumed(place, "damaged")) == numbers_of(place / "runs" / "whole")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_replay_and_measure_the_same(place, parallel):
    runs, model = place / "runs", place / "runs" / "first" / "final"
    changes = (REPLAY, f"training.parallel={parallel}")
    if not (runs / "one").exists():
        train_together(partial(train_here, place, model, "one", REPLAY), size=1)
    train_together(partial(train_here, place, model, parallel, *changes), size=2)
    rows = [open_prepared(runs / run / "earlier").fingerprint for run in ("one", parallel)]
    assert rows[0] == rows[1]
    for here, there in zip(measured(runs / "one"), measured(runs / parallel), strict=True):
        assert there.loss == pytest.approx(here.loss, rel=1e-4)
        assert (there.rows, there.answered, there.right) == (here.rows, here.answered, here.right)
    losses = [
        [one["loss"] for one in numbers_of(runs / run) if one["event"] == "StepDone"]
        for run in ("one", parallel)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
