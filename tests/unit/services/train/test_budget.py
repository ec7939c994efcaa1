"""How many steps fit into a time."""

from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sftcli.config.schema.settings import Settings
from sftcli.errors import UsageError
from sftcli.figures import seconds_of
from sftcli.services.train.budget import RESERVE, TIME, Pace, count_steps, evaluations_of

seconds = st.floats(0.001, 100)


def inputs_of(settings: Settings, heldout: int):
    return SimpleNamespace(
        settings=settings, prepared=SimpleNamespace(dataset=SimpleNamespace(heldout=range(heldout)))
    )


def settings_of(*, every: int, saves_every: int, in_background: bool) -> Settings:
    settings = Settings()
    training = settings.training.model_copy(update={"eval_every_steps": every})
    saves = {"every_steps": saves_every, "in_background": in_background}
    checkpoint = settings.checkpoint.model_copy(update=saves)
    return settings.model_copy(update={"training": training, "checkpoint": checkpoint})


@given(
    start=seconds, step=seconds, evaluation=seconds, save=seconds, minutes=st.floats(0.1, 600), every=st.integers(0, 50),
    heldout=st.integers(0, 1), saves_every=st.integers(0, 50), in_background=st.booleans(),
)  # fmt: skip
def test_as_many_steps_as_fit_beside_the_reserve_and_not_one_more(
    start, step, evaluation, save, minutes, every, heldout, saves_every, in_background
):
    pace = Pace(start=start, step=step, evaluation=evaluation, save=save)
    settings = settings_of(every=every, saves_every=saves_every, in_background=in_background)

    def needed(steps: int) -> float:
        return pace.seconds(steps, settings, evaluations=evaluations_of(settings, steps, heldout))

    room = (1 - RESERVE) * 60 * minutes
    assume(needed(1) <= room)
    budget = count_steps(pace, inputs_of(settings, heldout), minutes=minutes, end=None)
    assert budget.decided_by == TIME
    assert needed(budget.steps) <= room < needed(budget.steps + 1)
    assert budget.expected_seconds == needed(budget.steps)


@pytest.mark.parametrize(("end", "steps", "key"), [(10, 10, "training.epochs"), (1000, 56, TIME)])
def test_other_end_decides_where_it_comes_first(end, steps, key):
    pace = Pace(start=1.0, step=1.0, evaluation=0.0, save=0.0)
    budget = count_steps(pace, inputs_of(Settings(), 0), minutes=1, end=("training.epochs", end))
    assert (budget.steps, budget.decided_by, budget.allowed) == (steps, key, 56)


def test_no_step_fits():
    pace = Pace(start=50.0, step=10.0, evaluation=0.0, save=0.0)
    with pytest.raises(
        UsageError, match="1m00s is too short: a training of one step takes about 1m00s"
    ) as error:
        count_steps(pace, inputs_of(Settings(), 0), minutes=1, end=None)
    assert error.value.hint == "the least that would do for one step: --max-time 1m10s"
    named = seconds_of(error.value.hint.split()[-1]) / 60
    assert count_steps(pace, inputs_of(Settings(), 0), minutes=named, end=None).steps == 1
