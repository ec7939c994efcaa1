"""Every event has its place in every sink, and comes back from the log as it went in, from logs of other versions too."""

import io
import json
import math
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sftcli.cli.views.jsonl import JsonLinesView
from sftcli.cli.views.live import LiveView
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.cli.views.plain import PlainView, SilentView
from sftcli.events import (
    CheckpointSaved,
    DataPrepared,
    EarlierDone,
    Ending,
    Event,
    FitEnded,
    FitStarted,
    HeldoutDone,
    Judged,
    MemoryEased,
    ModelLoaded,
    ModelSaved,
    Notice,
    Progressed,
    RunStarted,
    StepDone,
    TextDelta,
    Warned,
    event_record,
)
from sftcli.services.runs.event_log import RunLog, read_events
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.summary import RunHistory, summarize_run
from sftcli.services.trackers.sink import numbers_of
from tests.support.fake_run import run_events, step_done

COUNTS = st.integers(-(2**63), 2**63 - 1)  # nothing is counted further
KINDS = get_args(Event)
EVERYWHERE = frozenset({"live", "plain", "jsonl", "training.log", "events.jsonl"})
PLACES = {
    Notice: EVERYWHERE,
    Warned: EVERYWHERE | {"quiet"},
    RunStarted: EVERYWHERE - {"training.log"},  # which lies in the folder of the run
    Progressed: {"live", "jsonl"},  # in the plain view not before it has taken long
    DataPrepared: EVERYWHERE,
    ModelLoaded: EVERYWHERE,
    FitStarted: EVERYWHERE,
    StepDone: EVERYWHERE | {"trackers"},
    MemoryEased: EVERYWHERE,
    Judged: EVERYWHERE | {"quiet"},
    HeldoutDone: EVERYWHERE | {"trackers"},
    EarlierDone: EVERYWHERE | {"trackers"},
    CheckpointSaved: EVERYWHERE,
    FitEnded: EVERYWHERE,
    ModelSaved: EVERYWHERE,
    TextDelta: set(),  # a result, which belongs to stdout
}
SAMPLES: dict[type[Event], Event] = {type(event): event for event in reversed(list(run_events()))} | {
    FitEnded: FitEnded(step=60, ending=Ending.STOPPED),
    TextDelta: TextDelta(text="an answer\n"),
    EarlierDone: EarlierDone(
        run="first",
        step=0,
        is_end=False,
        loss=0.03,
        response_tokens=400,
        seconds=4.0,
        rows=60,
        answered=60,
        right=48,
    ),
}
VALUES = {
    str: st.text(),
    int: COUNTS,
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    float | None: st.none() | st.floats(allow_nan=False, allow_infinity=False),
    dict[str, int]: st.dictionaries(st.text(), COUNTS),
    dict[str, dict[str, float]]: st.dictionaries(
        st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False))
    ),
    dict[str, object]: st.dictionaries(st.text(), st.none() | st.text() | st.integers()),
    Ending: st.sampled_from(Ending),
}


def any_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    types = get_type_hints(kind)
    return st.builds(kind, **{field.name: VALUES[types[field.name]] for field in fields(kind)})


def read(*lines: object, end: str = "") -> list[Event]:
    """Return what is read of a log that holds ``lines`` as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        text = "".join(json.dumps(line) + "\n" for line in lines) + end
        run.events.write_text(text, encoding="utf-8", newline="")
        return list(read_events(run))


def is_shown_live(event: Event) -> bool:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=20)
    view = LiveView(console=console, get_time=lambda: 0.0, auto_refresh=False)
    view(event)
    return bool(stream.getvalue()) or view.measures != TrainingMeasures()


def places_of(event: Event, folder: Path) -> set[str]:
    """Return the sinks that keep or show something of ``event``, and of the log nothing but the event itself."""
    plain, quiet, lines = io.StringIO(), io.StringIO(), io.StringIO()
    PlainView(stream=plain, get_time=lambda: 0.0, every_steps=1)(event)
    SilentView(stream=quiet)(event)
    JsonLinesView(stream=lines)(event)
    run = RunFolder(folder)
    with RunLog(run, every_steps=1, after_step=-1) as log:
        log(event)
    found = {
        "live": is_shown_live(event),
        "plain": plain.getvalue(),
        "quiet": quiet.getvalue(),
        "jsonl": lines.getvalue(),
        "training.log": (folder / "training.log").read_text(encoding="utf-8"),
        "events.jsonl": list(read_events(run)) == [event],
        "trackers": numbers_of(event),
    }
    return {place for place, content in found.items() if content}


@pytest.mark.parametrize("kind", KINDS)
def test_event_has_its_place_in_every_sink(kind, tmp_path):
    assert places_of(SAMPLES[kind], tmp_path) == PLACES[kind]  # of a new class: say where it belongs


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_event_is_read_as_it_was_written(kind, data):
    event = data.draw(any_of(kind))
    assert read(event_record(event)) == [event]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_comes_back_as_nan(value):
    [step] = read(event_record(replace(step_done(1), loss=value, utilization=value)))
    assert math.isnan(step.loss)
    assert step.utilization is None


@pytest.mark.parametrize("kind", KINDS)
def test_event_of_another_version_has_what_its_log_does_not_tell_as_empty(kind):
    bare = {"event": kind.__name__, "time": "2026-01-01T00:00:00", "new": [1]}
    lacking, strange = read(bare, bare | {field.name: [1] for field in fields(kind)})
    assert isinstance(lacking, kind)
    assert repr(lacking) == repr(strange)


def test_fields_that_are_missing_have_the_defaults_of_their_class():
    [step, heldout] = read(
        {"event": "StepDone", "step": 3, "loss": 1, "seconds": 2}, {"event": "HeldoutDone", "step": 3}
    )
    assert (step.step, step.loss, step.seconds, step.text_tokens, step.utilization) == (3, 1.0, 2.0, 0, None)
    assert isinstance(step.loss, float)
    assert math.isnan(step.grad_norm)
    assert (heldout.step, heldout.rows, math.isnan(heldout.loss)) == (3, 0, True)
    assert read({"event": "FitEnded", "step": 3, "ending": "tired"})[0].ending is Ending.FINISHED


def test_fields_are_read_under_the_names_that_older_versions_gave_them():
    [step] = read({"event": "StepDone", "step": 3, "passes": 2, "utilisation": 0.5})
    assert (step.micro_batches, step.utilization) == (2, 0.5)


def test_what_is_no_event_is_left_out_and_nan_in_text_is_no_number():
    found = read(
        {"event": "FromTheFuture", "step": 1}, {"event": ["StepDone"]}, {"step": 1}, [], None,
        {"event": "Notice", "text": "a\u2028b"}, {"event": "StepDone", "step": 1, "loss": math.nan},
        {"event": "StepDone", "step": 2, "loss": "NaN"},
        end='{"event": "StepDone", "step": 3, "lo',
    )  # fmt: skip
    assert [type(event) for event in found] == [Notice, StepDone, StepDone]
    assert found[0] == Notice(text="a\u2028b")
    assert RunHistory(found).losses == []


def test_run_without_a_log_has_no_events_and_one_of_another_version_a_summary(tmp_path):
    run = RunFolder(tmp_path)
    run.about.write_text("{}", encoding="utf-8")
    assert list(read_events(run)) == []
    run.events.write_text("".join(json.dumps({"event": kind.__name__}) + "\n" for kind in KINDS), "utf-8")
    summary = summarize_run(run)
    assert (summary.step, summary.loss, summary.heldout_loss, summary.training_seconds) == (0, None, None, 0)
