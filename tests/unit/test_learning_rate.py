import pytest

from sftcli.config.schema.training import TrainingSettings
from sftcli.training.optim.schedule import learning_rate_at


def rates(**changes) -> list[float]:
    settings = TrainingSettings(**({"max_steps": 10, "warmup_steps": 2, "learning_rate": 1.0} | changes))
    return [learning_rate_at(step, settings) for step in range(settings.max_steps)]


def test_warmup_rises_linearly_to_the_peak():
    assert rates()[:3] == [0.5, 1.0, 1.0]


def test_cosine_falls_to_zero_behind_the_last_step():
    values = rates()
    assert values[2:] == sorted(values[2:], reverse=True)
    assert values[6] == pytest.approx(0.5)
    assert learning_rate_at(10, TrainingSettings(max_steps=10, warmup_steps=2, learning_rate=1.0)) == 0


def test_linear_falls_in_equal_steps():
    assert rates(schedule="linear")[2:] == pytest.approx([1 - step / 8 for step in range(8)])


def test_constant_stays():
    assert rates(schedule="constant")[2:] == [1.0] * 8


def test_wsd_stays_and_then_falls_to_zero_behind_the_last_step():
    values = rates(schedule="wsd", decay_fraction=0.4)
    assert values[2:7] == [1.0] * 5
    assert values[7:] == pytest.approx([1 - (q / 4) ** 0.5 for q in (1, 2, 3)])
    settings = TrainingSettings(max_steps=10, warmup_steps=2, learning_rate=1.0, schedule="wsd")
    assert learning_rate_at(10, settings) == 0


def test_wsd_whose_decay_reaches_into_the_warmup_falls_from_its_end():
    values = rates(schedule="wsd", decay_fraction=1.0, warmup_steps=5)
    assert values[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert values[6:] == sorted(values[6:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_end_at_the_least_share_of_the_peak(schedule):
    settings = TrainingSettings(
        max_steps=10, warmup_steps=2, learning_rate=0.5, schedule=schedule, min_learning_rate_fraction=0.1
    )
    assert learning_rate_at(10, settings) == pytest.approx(0.05)
    assert max(learning_rate_at(step, settings) for step in range(10)) == 0.5


def test_warmup_is_a_share_of_the_steps_where_it_is_not_given():
    assert TrainingSettings(max_steps=100, warmup_steps=None, warmup_fraction=0.03).num_warmup_steps == 3


def test_steps_follow_from_epochs_and_rows():
    assert TrainingSettings(epochs=2.0, batch_size=32).for_rows(100).max_steps == 7
    assert TrainingSettings(max_steps=5).for_rows(100).max_steps == 5
