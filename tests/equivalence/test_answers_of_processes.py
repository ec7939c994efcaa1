"""Processes that train together share the held-out prompts; where they share out the weights there are no answers."""

import os
from functools import partial

import pytest

from sftcli.errors import ReportedByPeerError, UsageError
from sftcli.events import HeldoutDone
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder
from tests.support.several import make_place, train_here, train_together

ASKED = ("training.eval_answers=5",)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("asked"))


def given(place, run):
    events = read_events(RunFolder(place / "runs" / run))
    return [event.given for event in events if isinstance(event, HeldoutDone)]


def test_two_processes_give_the_answers_of_one(place):
    here = partial(train_here, place, place / "model")
    train_together(partial(here, "alone", *ASKED), size=1)
    train_together(partial(here, "two", *ASKED, "training.parallel=ddp"), size=2)
    assert [answers.rows for answers in given(place, "two")] == [5] * 3
    assert given(place, "two") == given(place, "alone")


def refused(place):
    """The first process names the reason; the other one may hear of it before it has found it."""
    reason = (
        "metric_for_best is check, and .* each process holds a part of the weights|another process failed"
    )
    with pytest.raises((UsageError, ReportedByPeerError), match=reason) as caught:
        train_here(
            place, place / "model", "best", "training.parallel=fsdp", "training.metric_for_best=check", *ASKED
        )
    assert os.environ["RANK"] != "0" or isinstance(caught.value, UsageError)


def test_weights_that_are_shared_out_give_none_and_no_best_checkpoint_by_them(place):
    here = partial(train_here, place, place / "model", "shared", "training.parallel=fsdp", *ASKED)
    train_together(here, size=2)
    assert given(place, "shared") == [None] * 3
    assert "not answered at evaluations: each process holds a part" in (
        place / "runs" / "shared" / "training.log"
    ).read_text(encoding="utf-8")
    train_together(partial(refused, place), size=2)
