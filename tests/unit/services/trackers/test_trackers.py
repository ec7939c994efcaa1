"""Trackers get the numbers of a run, and cannot stop it."""

import sys
from pathlib import Path

import pytest

from sftcli.events import Warned
from sftcli.services.trackers.sink import TrackerSink
from tests.support.fake_run import step_done
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def losses_of(run: Path, event: str) -> dict[int, float]:
    return {int(str(e["step"])): float(str(e["loss"])) for e in numbers_of(run) if e["event"] == event}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_step_once_after_a_resume(model, tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra track"
    )
    write_rows(tmp_path / "rows.jsonl")
    resolved = settings_of(tmp_path, model, "run.name=first", 'run.trackers=["tensorboard"]')
    train(resolved, StopAtStep(4))
    train(resolved, StopAtStep(99), auto=True)
    run = tmp_path / "runs" / "first"
    found = accumulators.EventAccumulator(str(run / "trackers" / "tensorboard"))
    found.Reload()
    for name, event in (("train/loss", "StepDone"), ("heldout/loss", "HeldoutDone")):
        told = {scalar.step: scalar.value for scalar in found.Scalars(name)}
        assert told == pytest.approx(losses_of(run, event), rel=1e-6)
    assert "train/learning_rate" in found.Tags()["scalars"]


def test_mlflow_holds_every_step(model, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra track")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_rows(tmp_path / "rows.jsonl")
    train(settings_of(tmp_path, model, "run.name=first", 'run.trackers=["mlflow"]'), StopAtStep(99))
    run = tmp_path / "runs" / "first"
    client, (identity,) = tracking.MlflowClient(), (run / "trackers" / "mlflow.id").read_text().split()
    told = {metric.step: metric.value for metric in client.get_metric_history(identity, "train/loss")}
    assert told == pytest.approx(losses_of(run, "StepDone"))
    assert client.get_run(identity).data.params["training.batch_size"] == "4"


class Broken:
    def __init__(self, good_calls: int) -> None:
        self.good_calls = good_calls

    def log(self, step, numbers, /):
        self.good_calls -= 1
        if self.good_calls < 0:
            raise ConnectionError("the line is dead")

    def close(self):
        raise ConnectionError("still dead")


def test_tracker_that_fails_warns_once_and_is_left_alone():

    heard = RecordingSink()
    sink = TrackerSink("wandb", lambda: Broken(1), heard)
    for step in range(1, 6):
        sink(step_done(step))
    sink.close()
    (warning,) = heard.of(Warned)
    assert (
        warning.text == "metrics are no longer sent to wandb: the line is dead; the run continues without it"
    )


def test_tracker_that_cannot_be_imported_is_one_warning_with_the_way_to_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import finds where it is not installed
    write_rows(tmp_path / "rows.jsonl")
    flag = StopAtStep(99)
    outcome = train(settings_of(tmp_path, model, "run.name=first", "run.trackers=wandb"), flag)
    assert outcome.final is not None
    (warning,) = [event.text for event in flag.events if isinstance(event, Warned) and "wandb" in event.text]
    assert 'pip install "wandb>=0.19"' in warning
    assert warning in (tmp_path / "runs" / "first" / "training.log").read_text(encoding="utf-8")
