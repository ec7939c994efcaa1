"""Laws of the rows that are trained on: shares are nested, copies stay together, and what is not asked for stays."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.config.schema.data import DataSettings
from sftcli.data.prepared.about import AboutRows, Manifest
from sftcli.data.prepared.store import HELDOUT, TEXT, TRAIN, ExampleTable, PreparedDataset
from sftcli.data.prepared.subset import with_subset
from sftcli.errors import DataError

SOURCES = ("a.jsonl", "b.jsonl")


def table_of(origins) -> ExampleTable:
    count = len(origins)
    columns = {
        "input_ids": pa.array([[1, number + 2] for number in range(count)], pa.list_(pa.int32())),
        "loss_mask": pa.array([[False, True]] * count, pa.list_(pa.bool_())),
        "path": pa.array([path for path, _ in origins], pa.string()),
        "line": pa.array([line for _, line in origins], pa.int64()),
        "flags": pa.array([[]] * count, pa.list_(pa.string())),
        "kind": pa.array(["conversation"] * count, pa.string()),
        "score": pa.array([float(number) for number in range(count)], pa.float64()),
        "row": pa.array([""] * count, pa.string()),
    }
    return ExampleTable(pa.table(columns))


def dataset_of(origins, paths=None) -> PreparedDataset:
    train, heldout = table_of(origins), table_of([("held.jsonl", 1)])
    about = AboutRows(paths=paths or {name: (name,) for name in SOURCES}, audit={})
    manifest = Manifest(files={}, about=about)
    return PreparedDataset(Path(), manifest, {TRAIN: train, HELDOUT: heldout, TEXT: table_of([])})


def data(**settings) -> DataSettings:
    return DataSettings(sources=SOURCES, **settings)


origins = st.lists(st.tuples(st.sampled_from(SOURCES), st.integers(1, 9)), min_size=2, max_size=60)
shares = st.floats(0.01, 1)


@given(origins=origins, one=shares, other=shares, seed=st.integers(0, 9))
def test_rows_of_a_smaller_share_are_among_those_of_a_larger_one(origins, one, other, seed):
    small, large = sorted((one, other))
    dataset = dataset_of(origins)
    chosen = [
        with_subset(dataset, data(train_share=share, share_seed=seed)).train for share in (small, large)
    ]
    assert set(chosen[0].scores) <= set(chosen[1].scores)
    places = len(set(origins))
    for share, table in zip((small, large), chosen, strict=True):
        assert len(set(table.origins())) == max(1, round(share * places))


@given(origins=origins, share=shares)
def test_all_examples_of_a_place_are_taken_or_none_and_in_their_order(origins, share):
    dataset = dataset_of(origins)
    chosen = with_subset(dataset, data(train_share=share)).train
    taken = set(chosen.origins())
    assert [int(score) for score in chosen.scores] == [
        row for row, origin in enumerate(origins) if origin in taken
    ]
    rows = [int(score) for score in chosen.scores]
    for place, row in enumerate(rows):
        assert chosen[place].input_ids.tolist() == dataset.train[row].input_ids.tolist()
        assert chosen.num_tokens[place] == dataset.train.num_tokens[row]
    keys = list(dataset.train.keys())
    assert list(chosen.keys()) == [keys[row] for row in rows]


@given(origins=origins, share=shares)
def test_a_source_that_is_left_out_is_gone_and_held_out_rows_stay(origins, share):
    dataset = dataset_of([*origins, ("a.jsonl", 1)])
    found = with_subset(dataset, data(leave_out=("b.jsonl",), train_share=share))
    assert {path for path, _ in found.train.origins()} == {"a.jsonl"}
    assert found.heldout is dataset.heldout
    assert found.fingerprint == dataset.fingerprint


def test_other_seeds_take_other_rows():
    dataset = dataset_of([("a.jsonl", line) for line in range(100)])
    taken = {
        tuple(with_subset(dataset, data(train_share=0.2, share_seed=seed)).train.scores) for seed in range(5)
    }
    assert len(taken) == 5


def test_all_rows_are_the_data_set_itself():
    dataset = dataset_of([("a.jsonl", 1)])
    assert with_subset(dataset, data()) is dataset


def test_two_sources_of_one_file_cannot_be_told_apart():
    dataset = dataset_of([("a.jsonl", 1)], paths={"a.jsonl": ["a.jsonl"], "b.jsonl": ["a.jsonl"]})
    with pytest.raises(DataError, match=r"a\.jsonl is also a file of the source b\.jsonl"):
        with_subset(dataset, data(leave_out=("a.jsonl",)))


@pytest.mark.parametrize("names", [("c.jsonl",), SOURCES])
def test_what_is_left_out_is_there_and_not_all(names):
    with pytest.raises(ValueError, match="leave_out names"):
        data(leave_out=names)


@given(origins=origins, share=shares)
def test_rows_that_are_joined_stand_behind_the_chosen_ones(origins, share):
    """As those that are replayed do where a share of the rows is trained on."""
    dataset, other = dataset_of(origins), dataset_of(origins[::-1])
    chosen = with_subset(dataset, data(train_share=share)).train
    joined = chosen.joined(other.train)
    assert list(joined.origins()) == [*chosen.origins(), *other.train.origins()]
    assert list(joined.num_tokens) == [*chosen.num_tokens, *other.train.num_tokens]
    assert len(joined) == len(chosen) + len(other.train)
