"""Which rows make which step: every row once an epoch, easy ones first where asked for, text steps evenly spread."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.batches.order import EpochOrder, TextSteps


@given(count=st.integers(1, 40), begin=st.integers(0, 100), seed=st.integers(0, 2**32 - 1))
def test_any_stretch_of_the_order_is_the_same_however_it_was_reached(count, begin, seed):
    walked = EpochOrder(count, seed=[seed])
    for place in range(begin):
        walked.rows(place, place + 1)
    assert walked.rows(begin, begin + 5) == EpochOrder(count, seed=[seed]).rows(begin, begin + 5)


@given(keys=st.lists(st.integers(0, 5), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_each_epoch_goes_from_the_lowest_key_to_the_highest_and_holds_every_row(keys, seed):
    order = EpochOrder(len(keys), seed=[seed], keys=keys)
    for epoch in range(2):
        rows = order.rows(epoch * len(keys), (epoch + 1) * len(keys))
        assert sorted(rows) == list(range(len(keys)))
        assert [keys[row] for row in rows] == sorted(keys)


def test_rows_of_equal_key_come_in_another_order_each_epoch():
    order = EpochOrder(20, seed=[3], keys=[0] * 20)
    assert order.rows(0, 20) != order.rows(20, 40)


@given(fraction=st.floats(0, 0.2), seed=st.integers(0, 99), step=st.integers(0, 10_000))
def test_text_steps_are_their_share_of_any_stretch_within_one_step(fraction, seed, step):
    steps = TextSteps(fraction, seed=seed)
    counted = sum(steps.is_text(step + index) for index in range(100))
    assert counted == steps.before(step + 100) - steps.before(step)
    assert abs(counted - 100 * fraction) <= 1.001


def test_no_text_is_no_step_of_text():
    assert not any(TextSteps(0.0, seed=seed).is_text(step) for seed in range(20) for step in range(50))


@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_text_steps_of_a_seed_stay_where_they_are_in_every_release(fraction):
    expected = {0.1: [6, 16, 26], 0.2: [3, 8, 13, 18, 23, 28]}[fraction]
    assert [step for step in range(30) if TextSteps(fraction, seed=0).is_text(step)] == expected
