"""The runs of a comparison: they differ in one key, in their seed and place, and in nothing else."""

import re
from pathlib import Path

import pytest

from sftcli.config.auto import Decided, with_values
from sftcli.config.schema.run import RUN_NAME_PATTERN
from sftcli.errors import UsageError
from sftcli.services.train.resuming.changes import named_settings
from tests.support.comparing import comparison_of

OPEN = ("-training.learning_rate", "-training.batch_size", "-data.heldout_fraction")


def children_of(asked, *changes, seeds=1, steps=7):
    comparison = comparison_of(asked, *OPEN, *changes, seeds=seeds)
    values = {"training.learning_rate": 3e-4, "training.batch_size": 4, "training.epochs": 5.0,
              "data.heldout_fraction": 0.2, "training.micro_batch_size": 4}  # fmt: skip
    decided = Decided(settings=with_values(comparison.reference, values), origins={})
    return comparison.children(Path("runs/all"), comparison.agreed(decided, steps))


def differing(children):
    named = [named_settings(child.resolved.settings) for child in children]
    return {key.removeprefix("setting ") for key in named[0] if len({one[key] for one in named}) > 1}


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ("rows=25%,100%", {"data.train_share"}),
        ("model=a,b", {"model.name"}),
        ("lr=1e-4,1e-3", {"training.learning_rate"}),
        ("training.weight_decay=0,0.1", {"training.weight_decay"}),
        (
            "adapter.kind=none,lora",
            {"adapter.kind", "training.learning_rate"},
        ),  # that of adapters goes with it
    ],
)
def test_runs_differ_in_what_is_compared(asked, keys):
    children = children_of(asked)
    assert differing(children) == keys
    assert all(child.resolved.settings.training.max_steps == 7 for child in children)


def test_a_batch_size_brings_micro_batches_that_fit():
    sizes = [(child.resolved.settings.training.batch_size, child.resolved.settings.training.micro_batch_size)
             for child in children_of("batch_size=2,16")]  # fmt: skip
    assert [batch for batch, _ in sizes] == [2, 16]
    assert all(micro <= batch for batch, micro in sizes)


def test_models_keep_the_rate_that_follows_from_their_size():
    assert {child.resolved.settings.training.learning_rate for child in children_of("model=a,b")} == {None}


def test_seeds_move_the_training_and_the_rows_of_a_share_but_not_the_split():
    children = children_of("rows=25%,100%", "training.seed=3", seeds=2)
    assert [(child.place, child.seed) for child in children] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    settings = [child.resolved.settings for child in children]
    assert [one.training.seed for one in settings] == [3, 3, 4, 4]
    assert [one.data.share_seed for one in settings] == [0, 0, 1, 1]
    assert {one.rows_seed for one in settings} == {3}


@pytest.mark.parametrize(
    "asked", ["model=/a/very/long/path/" + "x" * 80 + ",HuggingFaceTB/SmolLM2-135M", "lr=1e-4,.1", "rows=12.5%,100%", "model=../m,."]
)  # fmt: skip
def test_every_run_has_a_name_that_a_run_may_have(asked):
    names = [child.name for child in children_of(asked, seeds=2)]
    assert len({*names}) == len(names) == 4
    assert all(re.fullmatch(RUN_NAME_PATTERN, name) for name in names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.processes=2", "one process"),
        ("training.early_stopping_evals=2", "same number of steps"),
        ("data.heldout_fraction=0", "held-out rows"),
    ],
)
def test_what_cannot_be_kept_alike_is_refused(change, said):
    with pytest.raises(UsageError, match=said):
        comparison_of("lr=1e-4,1e-3", change)


def test_a_value_that_its_key_does_not_accept_is_refused_with_the_flag():
    with pytest.raises(UsageError, match=r"--compare: training\.batch_size is 0 but must be a whole number"):
        comparison_of("batch_size=0,8")
