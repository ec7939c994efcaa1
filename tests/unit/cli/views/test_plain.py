import io
import json
from dataclasses import replace

import pytest

from sftcli.cli.results.answers import TextWriter
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.cli.views.plain import PlainView, SilentView
from sftcli.cli.views.wording import end_line, step_line, stop_text
from sftcli.events import Ending, FitEnded, FitStarted, Notice, Progressed, StepDone, TextDelta, Warned
from tests.support.fake_run import HOSTILE, run_events, step_done
from tests.support.golden import assert_golden
from tests.support.recording import RecordingSink


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(*, every_steps: int = 10) -> tuple[PlainView, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return PlainView(stream=stream, get_time=clock, every_steps=every_steps), stream, clock


def test_a_run_reads_well_in_a_log() -> None:
    view, stream, clock = plain()
    for event in run_events():
        clock.now += event.seconds if isinstance(event, StepDone) else 0
        view(event)
    assert_golden("views/plain.txt", stream.getvalue())


def test_a_log_holds_no_control_characters() -> None:
    view, stream, _ = plain(every_steps=1)
    for event in run_events():
        view(event)
    assert all(char == "\n" or char.isprintable() for char in stream.getvalue())


def test_slow_steps_get_a_line_a_minute() -> None:
    view, stream, clock = plain(every_steps=1000)
    view(FitStarted(step=0, last_step=500))
    for step in range(1, 13):
        clock.now += 20
        view(step_done(step, seconds=20))
    assert [line.split()[1] for line in stream.getvalue().splitlines()[1:]] == [
        "1/500",
        "4/500",
        "7/500",
        "10/500",
    ]


def test_fast_steps_get_one_line_in_every_steps() -> None:
    view, stream, _ = plain(every_steps=5)
    view(FitStarted(step=0, last_step=12))
    for step in range(1, 13):
        view(step_done(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()[1:]] == [
        "1/12",
        "5/12",
        "10/12",
        "12/12",
    ]


def test_steps_that_are_replayed_have_no_end_and_no_time_left() -> None:
    measures = TrainingMeasures()
    measures.add_step(step_done(5))
    line = step_line(measures, step_done(5))
    assert line.startswith("step 5  loss ")
    assert "eta" not in line


def test_short_work_says_nothing_and_long_work_says_when_it_is_over() -> None:
    view, stream, clock = plain()
    for done in (0, 50, 100):
        view(Progressed(task="reading", done=done, total=100))
    for done in (0, 1000, 2000, 3000):
        view(Progressed(task="tokenizing", done=done, total=3000))
        clock.now += 12
    assert stream.getvalue().splitlines() == [
        "tokenizing 1,000/3,000 rows, 83/s, 24s left",
        "tokenizing 3,000/3,000 rows, 83/s",
    ]


def test_quiet_keeps_warnings() -> None:
    stream = io.StringIO()
    for event in run_events():
        SilentView(stream=stream)(event)
    assert stream.getvalue().startswith("warning: step 7 was skipped")
    assert stream.getvalue().splitlines()[1].startswith("spike: loss jumped to 9.1")
    assert stream.getvalue().count("\n") == 2


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_is_gone_does_not_end_the_work(closed: bool) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(text)

    stream = io.StringIO() if closed else Gone()
    if closed:
        stream.close()
    view = PlainView(stream=stream, get_time=Clock(), every_steps=1)
    for event in run_events():
        view(event)


def test_text_from_outside_is_harmless_in_ascii_too() -> None:
    binary = io.BytesIO()
    stream = io.TextIOWrapper(binary, encoding="ascii", errors="strict", newline="\n")
    view = PlainView(stream=stream, get_time=Clock(), every_steps=1)
    for event in (Notice(text=HOSTILE), Warned(text=HOSTILE)):
        view(event)
    lines = binary.getvalue().decode("ascii").splitlines()
    assert lines[0] == r"\x1b]52;c;aGk=\x07\x1b[31m[/] [bold]red\x9b2J\r\u202e \u2603"
    assert lines[1] == f"warning: {lines[0]}"


def test_an_answer_is_raw_in_a_file_and_harmless_on_a_terminal() -> None:
    raw, shown = io.StringIO(), io.StringIO()
    for stream, is_raw in ((raw, True), (shown, False)):
        TextWriter(view=RecordingSink(), stream=stream, raw=is_raw)(TextDelta(text=f"two\nlines {HOSTILE}"))
    assert raw.getvalue() == f"two\nlines {HOSTILE}"
    assert shown.getvalue().startswith("two\nlines \\x1b]52")


def test_a_watching_program_gets_every_event_as_a_line_of_json():
    from sftcli.cli.views.jsonl import JsonLinesView

    stream = io.StringIO()
    view = JsonLinesView(stream=stream)
    events = list(run_events())
    for event in events:
        view(event)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == [type(event).__name__ for event in events]
    skipped = next(line for line in lines if line.get("applied") is False)
    assert skipped["loss"] is None  # not finite
    assert stream.getvalue().isascii()


def test_early_end_says_why() -> None:
    event = FitEnded(step=80, ending=Ending.PLATEAU)
    measures = TrainingMeasures()
    text = "training stopped early at step 80"
    assert end_line(event, measures) == f"{text}: held-out loss stopped improving"
    measures.add_step(step_done(80))
    assert (
        end_line(event, measures) == f"{text} at 31% of the machine's peak: held-out loss stopped improving"
    )


def test_a_line_of_a_step_fits_80_columns() -> None:
    measures = TrainingMeasures()
    measures.start(FitStarted(step=0, last_step=10_000))
    step = replace(
        step_done(9_999), tokens=400_000, seconds=1.0, peak_memory_bytes=98_765_000_000, learning_rate=2e-4
    )
    measures.add_step(step)
    assert len(step_line(measures, step)) <= 80


@pytest.mark.parametrize("trains", [True, False])
def test_a_stop_is_answered_in_words_that_fit_the_place(trains) -> None:
    assert ("after this step" in stop_text(trains=trains)) is trains


def test_a_terminal_gets_whole_words_in_rows_that_fit_and_a_log_whole_lines() -> None:
    log, log_stream, _ = plain(every_steps=1)
    terminal, stream, _ = plain(every_steps=1)
    terminal.columns = 80
    for event in [*run_events(), Warned(text="word " * 40)]:
        log(event)
        terminal(event)
    rows = stream.getvalue().splitlines()
    assert max(map(len, rows)) <= 80 < max(map(len, log_stream.getvalue().splitlines()))
    assert stream.getvalue().split() == log_stream.getvalue().split()
    assert any(row.startswith("  ") for row in rows)
