import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.cli.views.measures import Trace, TrainingMeasures
from sftcli.events import FitStarted, HeldoutDone
from tests.support.fake_run import step_done


def started(*, step: int = 0, last_step: int = 100) -> TrainingMeasures:
    measures = TrainingMeasures()
    measures.start(FitStarted(step=step, last_step=last_step))
    return measures


def heldout(step: int, loss: float = 1.0, seconds: float = 10.0) -> HeldoutDone:
    return HeldoutDone(step=step, loss=loss, response_tokens=100, seconds=seconds)


def test_the_end_is_not_known_before_a_step() -> None:
    assert started().remaining_seconds is None


def test_the_slow_first_step_does_not_count_once_there_are_others() -> None:
    measures = started()
    measures.add_step(step_done(1, seconds=30.0))
    assert measures.remaining_seconds == 99 * 30
    measures.add_step(step_done(2, seconds=1.0))
    assert measures.remaining_seconds == 98


def test_evaluations_measured_so_far_are_part_of_the_time_left() -> None:
    measures = started()
    measures.add_heldout(heldout(0))
    for step in range(1, 21):
        measures.add_step(step_done(step, seconds=1.0))
    measures.add_heldout(heldout(20))
    assert measures.remaining_seconds == 80 + 4 * 10  # one every 20 steps
    for step in range(21, 31):
        measures.add_step(step_done(step, seconds=1.0))
    assert measures.remaining_seconds == 70 + 4 * 10  # none of them has happened since


def test_the_evaluation_before_training_announces_the_one_at_the_end() -> None:
    measures = TrainingMeasures()
    measures.add_heldout(heldout(0))
    measures.start(FitStarted(step=0, last_step=10))
    measures.add_step(step_done(1, seconds=1.0))
    assert measures.remaining_seconds == 9 + 10


def test_a_resumed_run_measures_itself_only() -> None:
    measures = started(step=50)
    measures.add_step(step_done(51, seconds=9.0))
    measures.add_step(step_done(52, seconds=2.0))
    assert measures.remaining_seconds == 48 * 2
    assert measures.fraction == 0.52


def test_only_the_last_evaluation_is_left_after_the_last_step() -> None:
    measures = started(last_step=2)
    measures.add_heldout(heldout(0))
    for step in (1, 2):
        measures.add_step(step_done(step))
    assert measures.remaining_seconds == heldout(0).seconds
    measures.add_heldout(heldout(2))
    assert measures.remaining_seconds == 0


def test_a_loss_that_is_not_finite_is_counted_and_not_averaged() -> None:
    measures = started()
    measures.add_step(step_done(1, loss=2.0))
    measures.add_step(step_done(2, loss=math.nan, applied=False))
    assert (measures.smooth_loss, measures.skipped_steps, measures.losses.points) == (2.0, 1, [2.0])


@given(st.floats(-100, 100), st.integers(1, 60))
def test_a_constant_loss_is_its_own_smoothed_value(loss: float, steps: int) -> None:
    measures = started()
    for step in range(1, steps + 1):
        measures.add_step(step_done(step, loss=loss))
    assert measures.smooth_loss == pytest.approx(loss)


def test_first_best_and_last_heldout_loss_are_kept_apart() -> None:
    measures = started()
    for step, loss in ((0, 3.0), (10, 1.0), (20, math.nan), (30, 2.0)):
        measures.add_heldout(heldout(step, loss))
    kept = (measures.first_heldout, measures.best_heldout, measures.last_heldout)
    assert [event and event.step for event in kept] == [0, 10, 30]


def test_speed_and_padding_are_of_recent_steps() -> None:
    measures = started()
    for step in range(1, 4):
        measures.add_step(step_done(step))
    assert measures.response_tokens_per_second == 512
    assert measures.tokens_per_second == 2048
    assert measures.padding_fraction == 1 / 9


@given(st.integers(0, 5000))
def test_a_curve_needs_bounded_memory_and_keeps_its_mean(length: int) -> None:
    trace = Trace()
    for value in range(length):
        trace.append(float(value))
    whole = len(trace.points) * trace.stride
    assert len(trace.points) < 512
    assert length - whole < trace.stride
    if whole:
        assert sum(trace.points) / len(trace.points) == pytest.approx((whole - 1) / 2)
