"""``--compare AXIS=V1,V2``: what it means, and what is refused by name."""

import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.config.schema.settings import Settings
from sftcli.errors import UsageError
from sftcli.services.compare.axis import Measure, parse_axis

TWO = Settings(data=DataSettings(sources=("a.jsonl", "b.jsonl")))


@pytest.mark.parametrize(
    ("asked", "key", "values", "measure"),
    [
        ("rows=12%,25%,100%", "data.train_share", [0.12, 0.25, 1.0], Measure.LOSS),
        ("model=A, B", "model.name", ["A", "B"], Measure.BITS),
        ("model.name=A,B", "model.name", ["A", "B"], Measure.BITS),
        ("source=each-left-out", "data.leave_out", [(), ("a.jsonl",), ("b.jsonl",)], Measure.LOSS),
        ("lr=1e-4,3e-4", "training.learning_rate", [1e-4, 3e-4], Measure.LOSS),
        ("training.batch_size=8,16", "training.batch_size", [8, 16], Measure.LOSS),
        ("batch-size=8,16", "training.batch_size", [8, 16], Measure.LOSS),
        ("rank=8,16", "adapter.rank", [8, 16], Measure.LOSS),
        ("train_embeddings=true,false", "training.train_embeddings", [True, False], Measure.LOSS),
        ("data.order=shuffled,length", "data.order", ["shuffled", "length"], Measure.LOSS),
    ],
)
def test_an_axis_is_a_key_and_its_values(asked, key, values, measure):
    axis = parse_axis(asked, TWO)
    assert (axis.key, [value.setting for value in axis.values], axis.measure) == (key, values, measure)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("rows", "has no axis and values"),
        ("rows=", "has no axis and values"),
        ("rows=50%", "has one value"),
        ("rows=50%,0%", "more than 0% and at most 100%"),
        ("rows=50%,101%", "more than 0% and at most 100%"),
        ("rows=50%,100", "must be a percentage"),
        ("rows=50%,50.0%", "twice"),
        ("lr=1e-4,0.0001", "twice"),
        ("rwos=25%,50%", "there is no axis 'rwos'"),
        ("seed=1,2", "there is no axis 'seed'"),
        ("training.seed=1,2", "--seeds"),
        ("epochs=1,2", "is the same for all runs"),
        ("max_steps=10,20", "is the same for all runs"),
        ("data.max_tokens=128,256", "changes the held-out rows"),
        ("heldout_fraction=0.1,0.2", "changes the held-out rows"),
        ("data.train_share=0.5,1", "rows="),
        ("run.name=a,b", "changes no loss"),
        ("source=a.jsonl,b.jsonl", "the one value is each-left-out"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(asked, said):
    with pytest.raises(UsageError) as refused:
        parse_axis(asked, TWO)
    assert said in str(refused.value)


def test_one_source_cannot_be_left_out():
    with pytest.raises(UsageError, match="needs two sources or more, and there is one"):
        parse_axis("source=each-left-out", Settings(data=DataSettings(sources=("a.jsonl",))))


def test_the_nearest_axis_is_named():
    with pytest.raises(UsageError) as refused:
        parse_axis("modle=A,B", TWO)
    assert "did you mean 'model'?" in refused.value.hint
