"""What page and card state of a run's events: nothing that was not measured, and nothing of another quantity."""

import json
import math
from dataclasses import replace

import pytest

from sftcli.events import Event, HeldoutDone, StepDone, event_record
from sftcli.services.report.facts import heldout_text
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.summary import RunHistory, summarize_run
from tests.support.fake_run import step_done


def heldout(step: int, loss: float) -> HeldoutDone:
    return HeldoutDone(step=step, loss=loss, response_tokens=10, seconds=1.0, rows=30)


def step(number: int, loss: float = 1.0, text_tokens: int = 0) -> StepDone:
    return replace(step_done(number, loss=loss), text_tokens=text_tokens)


def told(events: list[Event], *, takes_best: bool) -> str:
    return heldout_text(RunHistory(events), takes_best=takes_best)


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([], ""),
        ([heldout(0, math.nan)], ""),
        ([heldout(0, 2.0)], "2.000 at step 0, not measured since, of 30 rows"),
        ([heldout(0, 2.0), step(1), step(2)], "2.000 at step 0, not measured since, of 30 rows"),
        ([heldout(0, 2.0), step(1), heldout(1, 1.5)], "2.000 before, 1.500 after, of 30 rows"),
        (
            [heldout(0, 2.0), step(1), heldout(1, 1.5), step(2)],
            "2.000 before, 1.500 at step 1, not measured since, of 30 rows",
        ),
        (
            [heldout(0, 2.0), step(1), heldout(1, 1.5), step(2), heldout(2, 1.7)],
            "2.000 before, 1.700 after, of 30 rows",
        ),
    ],
)
def test_the_heldout_loss_after_training_is_one_that_was_measured_there(events, text):
    assert told(events, takes_best=False) == text


def test_where_the_best_step_is_the_final_model_its_loss_is_told():
    events = [heldout(0, 2.0), step(1), heldout(1, 1.5), step(2), heldout(2, 1.7)]
    assert told(events, takes_best=True) == "2.000 before, 1.500 after (step 1), of 30 rows"
    worse = [heldout(0, 1.0), step(1), heldout(1, 1.5), step(2), heldout(2, 1.7)]
    assert told(worse, takes_best=True) == "1.000 before, 1.700 after, of 30 rows"


def test_the_loss_of_a_run_is_that_of_rows_where_its_last_step_was_running_text(tmp_path):
    run = RunFolder(tmp_path / "one")
    run.path.mkdir()
    run.about.write_text("{}", encoding="utf-8")
    events = [step(1, loss=1.5), step(2, loss=3.5, text_tokens=10)]
    (run.path / "events.jsonl").write_text(
        "".join(json.dumps(event_record(event)) + "\n" for event in events), encoding="utf-8"
    )
    summary = summarize_run(run)
    assert (summary.step, summary.loss, summary.curve) == (2, 1.5, (1.5,))
