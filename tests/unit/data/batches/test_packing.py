"""Packs and groups: every row once, none too full, the same everywhere, and little waste."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.batches.packing import best_fit, best_fit_even, group_alike

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=60)
packers = pytest.mark.parametrize("packer", [best_fit, best_fit_even])


@packers
@given(lengths=lengths_lists, capacity=st.integers(1, 100))
def test_packs_hold_every_row_once_and_no_more_than_fits(packer, lengths, capacity):
    packs = packer(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[index] for index in pack) <= capacity or len(pack) == 1
    assert packs == packer(lengths, capacity)


@given(lengths=lengths_lists, capacity=st.integers(60, 100))
def test_no_two_packs_fit_into_one(lengths, capacity):
    fills = sorted(sum(lengths[index] for index in pack) for pack in best_fit(lengths, capacity))
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@given(lengths=lengths_lists, capacity=st.integers(60, 100))
def test_even_packs_are_as_many_and_never_fuller(lengths, capacity):
    plain, even = best_fit(lengths, capacity), best_fit_even(lengths, capacity)
    assert len(even) == len(plain)
    fullest = [max(sum(lengths[index] for index in pack) for pack in packs) for packs in (plain, even)]
    assert fullest[1] <= fullest[0]


@given(lengths=lengths_lists, max_rows=st.integers(1, 20))
def test_groups_hold_every_row_once_longest_first_and_no_more_than_allowed(lengths, max_rows):
    groups = group_alike(lengths, max_rows)
    order = [index for group in groups for index in group]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    assert max(map(len, groups)) <= max_rows


def test_best_fit_fills_the_hole_that_is_left_by_the_longest():
    assert best_fit([2, 7, 5, 3, 3], 10) == [[1, 3], [2, 4, 0]]


def test_even_packs_share_what_one_pack_more_than_needed_would_hold():
    assert best_fit([5] * 6, 20) == [[0, 1, 2, 3], [4, 5]]
    assert best_fit_even([5] * 6, 20) == [[0, 1, 2], [3, 4, 5]]


def test_a_long_row_among_short_ones_is_grouped_alone_where_padding_costs_more_than_a_pass():
    assert group_alike([500, 10, 10, 10], 4, pass_positions=100) == [[0], [1, 2, 3]]
    assert group_alike([500, 490, 480], 4, pass_positions=100) == [[0, 1, 2]]
