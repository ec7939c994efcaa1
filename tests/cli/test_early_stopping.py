"""Early stopping as a user meets it: whole runs of the service on the tiny model."""

import pytest
import torch
from safetensors.torch import load_file

from sftcli.errors import UsageError
from sftcli.events import Ending, Notice
from sftcli.training.checkpoint.names import list_checkpoints, step_of
from tests.support.runs import StopAtStep, events_of, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model, same_weights

NEVER = 99
EARLY = (
    "run.name=early", "training.epochs=20", "training.eval_every_steps=2", "training.early_stopping_evals=2",
    "training.learning_rate=5e-2", "training.schedule=constant", "checkpoint.keep_last=1",
    "checkpoint.keep_best=false", "training.precision=bf16",  # no rounded number may reach the final model
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    write_rows(folder / "rows.jsonl")
    build_tiny_model(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def _shared_cache(place, monkeypatch):
    monkeypatch.setenv("SFT_CACHE_DIR", str(place / "cache"))


def test_early_end_makes_the_best_checkpoint_the_final_model_and_says_so(place):
    flag = StopAtStep(NEVER)
    outcome = train(settings_of(place, place / "model", *EARLY), flag)
    run = place / "runs" / "early"
    heldout = {event["step"]: event["loss"] for event in events_of(run, "HeldoutDone")}
    best = min(heldout, key=heldout.get)
    assert outcome.ending is Ending.PLATEAU
    assert outcome.step < outcome.last_step
    assert 0 < best < outcome.step
    assert outcome.last_heldout_loss == heldout[best]
    assert outcome.final == str(run / "final")
    saved = {step_of(path): path for path in list_checkpoints(run / "checkpoints")}
    assert set(saved) == {best, outcome.step}
    assert same_weights(run / "final", saved[best], dtype=torch.float32)
    assert not same_weights(run / "final", saved[outcome.step], dtype=torch.float32)
    assert load_file(run / "final" / "model.safetensors")
    assert any(
        f"final/ holds step {best}:" in event.text for event in flag.events if isinstance(event, Notice)
    )
    assert "Stopped early at step" in (run / "training.log").read_text()
    assert "held-out loss stopped improving" in (run / "report.html").read_text()


def test_early_stopping_without_heldout_rows_is_refused(place):
    resolved = settings_of(place, place / "model", *EARLY, "run.name=none", "data.heldout_fraction=0")
    with pytest.raises(UsageError, match="needs held-out rows") as caught:
        train(resolved, StopAtStep(NEVER))
    assert caught.value.exit_code == 2


def test_early_stopping_without_evaluations_is_refused(place):
    with pytest.raises(UsageError, match="early_stopping_evals"):
        settings_of(place, place / "model", *EARLY, "training.eval_every_steps=0")
