import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.cli.terminal.text import ASCII_SIGNS, UNICODE_SIGNS
from sftcli.cli.views.measures import TrainingMeasures
from sftcli.cli.views.panel import Frame, Row, Task, build_panel, row_width
from sftcli.cli.views.wording import progress_line
from sftcli.events import CheckpointSaved, FitStarted, HeldoutDone, Progressed, StepDone
from tests.support.fake_run import run_events, step_done
from tests.support.golden import assert_golden


def measures_after(steps: int) -> TrainingMeasures:
    measures = TrainingMeasures()
    for event in run_events():
        if isinstance(event, StepDone):
            if event.step > steps:
                break
            measures.add_step(event)
        elif isinstance(event, FitStarted):
            measures.start(event)
        elif isinstance(event, HeldoutDone):
            measures.add_heldout(event)
        elif isinstance(event, CheckpointSaved):
            measures.add_checkpoint(event)
    return measures


def draw(rows: list[Row]) -> str:
    return "".join("".join(text for text, _ in row) + "\n" for row in rows)


def task(name: str, done: int, total: int, unit: str = "rows", seconds: float = 0.0) -> Task:
    return Task(event=Progressed(task=name, done=done, total=total, unit=unit), seconds=seconds)


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 100, 160, 200])
def test_the_panel_is_good_to_look_at(columns: int) -> None:
    moments = {
        "before the first step": build_panel(
            measures_after(0),
            Frame(is_training=True, elapsed_seconds=3),
            columns=columns,
            signs=UNICODE_SIGNS,
        ),
        "during an evaluation": build_panel(
            measures_after(52),
            Frame(
                is_training=True,
                elapsed_seconds=31,
                since_step_seconds=1,
                checkpoint_age_seconds=8,
                tasks=(task("held-out", 30, 64),),
                note="stopping after this step; press Ctrl-C again to quit now",
            ),
            columns=columns,
            signs=UNICODE_SIGNS,
        ),
        "at the end": build_panel(
            measures_after(60),
            Frame(is_training=True, elapsed_seconds=80, final=True),
            columns=columns,
            signs=UNICODE_SIGNS,
        ),
        "other work": build_panel(
            TrainingMeasures(),
            Frame(
                tasks=(
                    task("rendering", 1200, 5000, seconds=6),
                    task("download HuggingFaceTB/SmolLM2-135M", 80_000_000, 270_000_000, "bytes", seconds=10),
                    task("reading", 1200, 0),
                )
            ),
            columns=columns,
            signs=UNICODE_SIGNS,
        ),
    }
    text = "".join(f"# {name}\n{draw(rows)}\n" for name, rows in moments.items())
    assert_golden(f"views/panel-{columns}.txt", text)


def test_the_panel_can_be_drawn_in_ascii() -> None:
    frame = Frame(is_training=True, elapsed_seconds=31, tasks=(task("held-out", 30, 64),))
    text = draw(build_panel(measures_after(52), frame, columns=100, signs=ASCII_SIGNS))
    assert text.isascii()
    assert_golden("views/panel-ascii.txt", text)


@given(
    columns=st.integers(1, 220),
    steps=st.integers(0, 60),
    name=st.text(max_size=60),
    done=st.integers(0, 10**12),
    total=st.integers(0, 10**12),
    elapsed=st.floats(0, 1e9),
)
def test_no_row_is_wider_than_the_terminal(
    columns: int, steps: int, name: str, done: int, total: int, elapsed: float
) -> None:
    frame = Frame(
        is_training=True,
        elapsed_seconds=elapsed,
        checkpoint_age_seconds=elapsed,
        tasks=(task(name, done, total, "bytes", elapsed),),
    )
    rows = build_panel(MEASURES[steps], frame, columns=columns, signs=UNICODE_SIGNS)
    assert all(row_width(row) <= columns for row in rows)


MEASURES = [measures_after(steps) for steps in range(61)]


def test_what_is_not_finite_is_said_in_words_and_in_red() -> None:
    measures = measures_after(1)
    measures.add_step(step_done(2, loss=math.nan, applied=False))
    rows = build_panel(measures, Frame(is_training=True), columns=100, signs=UNICODE_SIGNS)
    assert ("not finite", "bold red") in [span for row in rows for span in row]


def test_time_left_runs_down_during_a_step_and_not_below_zero() -> None:
    measures = measures_after(59)
    shown = [
        draw(
            build_panel(
                measures,
                Frame(is_training=True, since_step_seconds=seconds),
                columns=100,
                signs=UNICODE_SIGNS,
            )
        ).splitlines()[0]
        for seconds in (0, 3, 1000)
    ]
    assert [line.split()[-2] for line in shown] == ["5s", "2s", "0s"]


@pytest.mark.parametrize(("later", "told"), [(0.0, "  20s left"), (40.0, "  1m00s left"), (math.inf, "")])
def test_the_time_left_is_that_of_the_command_and_is_not_guessed(later: float, told: str) -> None:
    event = Progressed(task="2 of 4: answering (base)", done=30, total=90, later_seconds=later)
    drawn = draw(
        build_panel(
            TrainingMeasures(),
            Frame(tasks=(Task(event=event, seconds=10.0),)),
            columns=120,
            signs=UNICODE_SIGNS,
        )
    )
    assert drawn.endswith(f"30/90 rows  3/s{told}\n")
    assert progress_line(event, 10.0).endswith(f"30/90 rows, 3/s{told.replace('  ', ', ')}")
