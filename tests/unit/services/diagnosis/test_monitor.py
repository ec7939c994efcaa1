"""Judgements on synthetic curves: they come when they should, once, and not on noise."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sftcli.config.schema.settings import Settings
from sftcli.events import FitStarted, HeldoutDone, Judged, StepDone
from sftcli.services.diagnosis.monitor import FitWatch, SpikeDetector, watched
from sftcli.services.diagnosis.verdict import Again
from sftcli.services.runs.folder import RunFolder
from tests.support.recording import RecordingSink

AGAIN = Again(run=RunFolder(Path("runs") / "one"), settings=Settings())


def step(number: int, loss: float, norm: float = 1.0) -> StepDone:
    return StepDone(
        step=number, loss=loss, grad_norm=norm, learning_rate=1e-4, applied=math.isfinite(loss), epoch=0.0,
        response_tokens=10, tokens=20, padding_tokens=0, seconds=0.1, peak_memory_bytes=0,
    )  # fmt: skip


def heldout(number: int, loss: float) -> HeldoutDone:
    return HeldoutDone(step=number, loss=loss, response_tokens=10, seconds=0.1)


def run_of(train, heldout_at=(), *, last_step=None, watch=None):
    """Show a watch a whole run; return what it said as (step, kind)."""
    sink = RecordingSink()
    emit = watched(watch or FitWatch(again=AGAIN), sink)
    losses = dict(heldout_at)
    if 0 in losses:
        emit(heldout(0, losses[0]))
    emit(FitStarted(step=0, last_step=last_step or len(train)))
    for number, value in enumerate(train, start=1):
        emit(step(number, *value) if isinstance(value, tuple) else step(number, value))
        if number in losses:
            emit(heldout(number, losses[number]))
    return [(event.step, event.kind) for event in sink.of(Judged)], sink


def noisy(curve, scale, seed=0):
    return [float(x) for x in curve * np.exp(np.random.default_rng(seed).normal(0, scale, len(curve)))]


FALLING = 0.6 + 1.2 * np.exp(-np.arange(400) / 100)


def test_overfitting_is_said_once_when_heldout_loss_rises_twice_while_training_loss_falls():
    points = [(0, 1.9), (50, 1.4), (100, 1.2), (150, 1.3), (200, 1.4), (250, 1.5), (400, 1.8)]
    said, sink = run_of(noisy(FALLING, 0.1), points)
    assert said == [(200, "overfitting")]
    assert "rose from 1.200 to 1.400" in sink.of(Judged)[0].reason
    assert sink.of(Judged)[0].advice.endswith(
        "sft train --config runs/one/config.toml --run one-2 --max-steps 100"
    )


def test_heldout_loss_that_rises_once_and_falls_again_is_no_news():
    points = [(0, 1.9), (50, 1.4), (100, 1.2), (150, 1.25), (200, 1.1), (400, 0.9)]
    assert run_of(noisy(FALLING, 0.1), points)[0] == []


def test_rise_in_the_last_evaluation_is_said():
    assert run_of(noisy(FALLING, 0.1), [(0, 1.9), (200, 1.2), (400, 1.4)])[0] == [(400, "overfitting")]


def test_run_that_only_made_the_model_worse_is_degrading():
    said, sink = run_of(noisy(FALLING, 0.1), [(0, 1.0), (100, 1.2), (200, 1.3), (400, 1.4)])
    assert said == [(200, "degrading")]
    assert "--learning-rate" in sink.of(Judged)[0].advice


def test_a_loss_that_rests_at_a_high_value_is_not_judged_for_it():
    assert run_of(noisy(np.full(400, 1.6), 0.05))[0] == []


def test_nothing_is_said_of_few_held_out_rows():
    points = [(0, 1.9), (50, 1.4), (100, 1.2), (150, 1.3), (200, 1.4), (400, 1.8)]
    sink = RecordingSink()
    emit = watched(watch := FitWatch(again=AGAIN), sink)
    emit(FitStarted(step=0, last_step=400))
    for number, loss in points:
        emit(replace(heldout(number, loss), rows=5))
        emit(step(number + 1, 1.0))
    assert not sink.of(Judged)
    assert watch.verdict(400).kind == "unknown"


def test_plateau_is_said_once_and_not_where_the_run_stops_by_itself():
    points = [(0, 1.5), (50, 0.9), *((s, 0.898) for s in range(100, 401, 50))]
    assert run_of(noisy(FALLING, 0.1), points)[0] == [(200, "plateau")]
    assert run_of(noisy(FALLING, 0.1), points, watch=FitWatch(again=AGAIN, stops_early=True))[0] == []


@pytest.mark.parametrize("bad", [9.0, (0.8, 60.0)], ids=["loss", "gradient norm"])
def test_spike_names_its_rows_and_is_told_from_noise(bad):
    losses = noisy(FALLING, 0.1)
    losses[249] = bad
    watch = FitWatch(again=AGAIN, name_rows=lambda number: f"a.jsonl:{number}")
    said, sink = run_of(losses, watch=watch)
    assert said == [(250, "spike")]
    assert "a.jsonl:250" in sink.of(Judged)[0].reason


def test_many_spikes_are_told_once_in_a_while():
    losses = noisy(FALLING, 0.1)
    for number in range(200, 400, 5):
        losses[number] = 9.0
    said, _ = run_of(losses)
    assert said == [(201, "spike"), (251, "spike"), (301, "spike"), (351, "spike")]


@pytest.mark.parametrize("scale", [0.02, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_makes_next_to_no_spikes(scale, seed):
    detector = SpikeDetector(1.5)
    values = noisy(0.5 + np.exp(-np.arange(5000) / 500), scale, seed)
    assert sum(detector.usual(value) is not None for value in values) <= 2


def test_values_that_are_not_finite_are_left_to_the_trainer():
    losses = noisy(FALLING, 0.1)
    losses[100:103] = [math.nan, math.inf, math.nan]
    assert run_of(losses, [(0, 1.9), (200, math.nan), (400, 1.0)])[0] == []


@pytest.mark.parametrize("cut", [160, 210, 260])
def test_resumed_run_says_what_an_uninterrupted_one_says(cut):
    losses = noisy(FALLING, 0.1)
    losses[249] = 9.0
    points = [(0, 1.9), (50, 1.4), (100, 1.2), (150, 1.3), (200, 1.4), (250, 1.5), (400, 1.8)]
    whole, sink = run_of(losses, points)
    watch = FitWatch(again=AGAIN)
    watch.replay(event for event in sink.events if getattr(event, "step", 0) <= cut)
    rest = RecordingSink()
    emit = watched(watch, rest)
    emit(FitStarted(step=cut, last_step=400))
    for number in range(cut + 1, 401):
        emit(step(number, losses[number - 1]))
        if number in dict(points):
            emit(heldout(number, dict(points)[number]))
    assert [(event.step, event.kind) for event in rest.of(Judged)] == [s for s in whole if s[0] > cut]
    assert [kind for _, kind in whole] == ["overfitting", "spike"]
