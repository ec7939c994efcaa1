"""Settings that nobody chose follow from the rows and the model."""

from itertools import pairwise

import pytest

from sftcli.config.auto import AUTO_KEYS, RATE_RULES, ROWS_RULES, decide_open, rate_for, rule_for_rows
from sftcli.config.resolve import parse_set, resolve


def decided(*sets, rows=150, parameters=135_000_000, share=0.2):
    settings = resolve(
        preset=None, config_file=None, overrides=[parse_set(text) for text in sets], environ={}
    ).settings
    return decide_open(settings, rows=rows, parameters=parameters, heldout_fraction=share)


def test_every_value_moves_in_one_direction_with_the_rows_and_with_the_size():
    for fewer, more in pairwise(ROWS_RULES):
        assert fewer.below < more.below
        assert fewer.batch_size <= more.batch_size
        assert fewer.epochs >= more.epochs
        assert fewer.heldout_fraction >= more.heldout_fraction
    for smaller, larger in pairwise(RATE_RULES):
        assert smaller.up_to < larger.up_to
        assert smaller.learning_rate > larger.learning_rate


@pytest.mark.parametrize(
    ("rows", "batch"), [(1, 4), (99, 4), (100, 8), (499, 8), (500, 16), (9_999, 16), (10_000, 32)]
)
def test_the_bounds_of_a_rule_belong_to_the_next_one(rows, batch):
    assert rule_for_rows(rows).batch_size == batch


def test_a_set_of_tens_of_thousands_of_rows_gets_the_numbers_of_the_recipe():
    rule = rule_for_rows(52_002)
    assert (rule.batch_size, rule.epochs, rule.heldout_fraction) == (32, 3, 0.02)
    assert rate_for(7_000_000_000) == 1e-5


def test_a_hundred_and_fifty_rows_take_enough_small_steps_at_a_rate_that_teaches():
    settings = decided().settings.training
    assert settings.for_rows(120).max_steps == 45
    assert (settings.batch_size, settings.learning_rate) == (8, 3e-4)


def test_each_value_says_what_it_follows_from():
    assert decided().origins == {
        "training.batch_size": "auto: 150 rows",
        "training.epochs": "auto: 150 rows",
        "training.learning_rate": "auto: 135M parameters",
        "data.heldout_fraction": "auto: 150 rows",
    }


def test_what_someone_chose_stays():
    chosen = decided(
        "training.batch_size=32",
        "training.epochs=1",
        "training.learning_rate=1e-5",
        "data.heldout_fraction=0.02",
    )
    assert not chosen.origins
    assert chosen.settings.training.batch_size == 32
    assert set(decided("training.epochs=1").origins) == set(AUTO_KEYS) - {"training.epochs"}


def test_adapters_get_the_rate_of_adapters_also_where_the_rate_was_unset():
    assert decided("adapter.kind=lora").settings.training.learning_rate == 2e-4
    assert decided("adapter.kind=lora", "training.learning_rate=none").settings.training.learning_rate == 2e-4


def test_named_held_out_rows_leave_no_share_to_decide():
    assert "data.heldout_fraction" not in decided("data.heldout_sources=held.jsonl").origins


def test_micro_batches_are_no_larger_than_a_batch_that_was_decided():
    assert decided(rows=50).settings.training.micro_batch_size == 4
    assert decided(rows=50_000).settings.training.micro_batch_size == 8
