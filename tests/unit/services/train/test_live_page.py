"""The page of a run that goes on."""

from itertools import pairwise
from pathlib import Path

import pytest

from sftcli.events import Ending, FitEnded, HeldoutDone, StepDone
from sftcli.services.runs.event_log import read_events
from sftcli.services.runs.folder import RunFolder
from sftcli.services.train.live_page import FIRST_AFTER, SHARE, LivePage
from tests.support.runs import StopAtStep, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

RENEWS = 'http-equiv="refresh"'


class Clock:
    """A clock that goes ``each`` seconds further whenever it is looked at."""

    def __init__(self, each: float) -> None:
        self.now, self.each = 0.0, each

    def __call__(self) -> float:
        self.now += self.each
        return self.now


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    place = tmp_path_factory.mktemp("live")
    write_rows(place / "rows.jsonl")
    train(settings_of(place, build_tiny_model(place / "tiny")), StopAtStep(99))
    (folder,) = (place / "runs").iterdir()
    return RunFolder(folder)


def written(page: LivePage, events: list) -> list[int]:
    """Return the places of the events after which there was a new page."""
    found = []
    for place, event in enumerate(events):
        page.run.report.unlink(missing_ok=True)
        page(event)
        if page.run.report.exists():
            found.append(place)
    return found


def test_a_short_run_has_its_page_at_its_end_and_it_does_not_renew_itself(run: RunFolder):
    events = list(read_events(run))
    assert RENEWS not in run.report.read_text(encoding="utf-8")
    assert written(LivePage(run, clock=Clock(0)), events) == []


def test_a_long_run_has_a_page_after_each_held_out_loss_but_that_of_the_start(run: RunFolder):
    events = list(read_events(run))
    expected = [place for place, event in enumerate(events) if isinstance(event, HeldoutDone) and event.step]
    page = LivePage(run, clock=Clock(0))
    page._not_before = 0.0
    assert len(expected) > 1
    assert written(page, events[: expected[-1] + 1]) == expected
    text = run.report.read_text(encoding="utf-8")
    assert RENEWS in text
    assert "The run goes on." in text


def test_pages_take_a_small_share_of_the_time_and_none_after_the_end(run: RunFolder):
    clock = Clock(1)  # so that a page takes a second
    page = LivePage(run, clock=clock)
    heldout = next(event for event in read_events(run) if isinstance(event, HeldoutDone) and event.step)
    times = []
    for _ in range(1000):
        times += [clock.now] * len(written(page, [heldout]))
    assert times[0] >= FIRST_AFTER
    assert len(times) > 2
    assert all(after - before >= 1 / SHARE for before, after in pairwise(times))
    page(FitEnded(step=10, ending=Ending.FINISHED))
    clock.now += 1e6
    assert written(page, [heldout]) == []


def test_a_page_that_cannot_be_written_is_not_tried_again(run: RunFolder, tmp_path: Path):
    page = LivePage(RunFolder(tmp_path / "gone"), clock=Clock(0))
    page._not_before = 0.0
    events = [event for event in read_events(run) if isinstance(event, HeldoutDone | StepDone)]
    assert written(page, events) == []
    assert page._not_before == float("inf")
