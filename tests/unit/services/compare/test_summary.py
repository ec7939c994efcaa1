"""From scores of rows to differences, a slope, and what follows; numbers against numpy and against simulation."""

import numpy as np
import pytest

from sftcli.config.schema.data import DataSettings
from sftcli.config.schema.settings import Settings
from sftcli.errors import DataError
from sftcli.services.compare.axis import Measure, parse_axis
from sftcli.services.compare.record import RowScores
from sftcli.services.compare.summary import doubling, gather, judge, report_of, summarize
from sftcli.services.evaluate.metrics import paired_difference

ROWS = 60


def scores(nll, *, ids=None, num_bytes=None, train_rows=100) -> RowScores:
    ids = ids or [f"a.jsonl:{row}" for row in range(len(nll))]
    tokens = tuple(2 + row % 5 for row in range(len(nll)))
    return RowScores(
        ids=tuple(ids),
        nll=tuple(map(float, nll)),
        tokens=tokens,
        num_bytes=tuple(num_bytes or (4 * count for count in tokens)),
        train_rows=train_rows,
        seconds=1.0,
    )


def losses(seed: int, *, shift: float = 0.0, rows: int = ROWS):
    generator = np.random.default_rng(seed)
    return generator.gamma(4.0, 1.0, size=rows) + shift


@pytest.mark.parametrize("seeds", [1, 3])
def test_slope_of_doubling_is_that_of_polyfit(seeds):
    sizes = [12, 25, 50, 100]
    runs = [
        [scores(losses(10 * size + seed, shift=-np.log2(size)), train_rows=size) for seed in range(seeds)]
        for size in sizes
    ]
    gathered = gather(runs, Measure.LOSS)
    slope, _ = np.polyfit(np.log2(sizes), gathered.by_seed().mean(axis=1), 1)
    found = doubling(gathered, sizes)
    assert found.value == pytest.approx(slope, abs=1e-12)
    assert found.low < found.value < found.high


def test_interval_of_the_slope_is_that_of_slopes_fitted_to_resampled_rows():
    sizes = [12, 25, 50, 100]
    runs = [[scores(losses(size), train_rows=size)] for size in sizes]
    gathered = gather(runs, Measure.LOSS)
    generator = np.random.default_rng(1)
    slopes = []
    for _ in range(2000):
        drawn = generator.integers(0, ROWS, ROWS)
        means = gathered.sums[:, 0, drawn].sum(axis=1) / gathered.counts[drawn].sum()
        slopes.append(np.polyfit(np.log2(sizes), means, 1)[0])
    found = doubling(gathered, sizes)
    width = found.high - found.low
    assert np.quantile(slopes, [0.025, 0.975]) == pytest.approx([found.low, found.high], abs=0.1 * width)


def test_a_line_needs_two_sizes():
    runs = [[scores(losses(1))], [scores(losses(2))]]
    assert doubling(gather(runs, Measure.LOSS), [1, 1]) is None


def test_one_seed_given_as_a_table_is_one_seed():
    first, second, counts = losses(1), losses(2), [3] * ROWS
    assert paired_difference([first], [second], counts) == paired_difference(first, second, counts)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_with_several_seeds_the_interval_holds_the_truth_about_as_often_as_it_says(seeds):
    """The spread of seeds is as large as that of rows; a bootstrap of rows alone, or a plain one of seeds, holds it far less often."""
    generator = np.random.default_rng(7)
    hits, tries, truth = 0, 120, 0.3
    for _ in range(tries):
        rows = generator.normal(0, 1, size=(1, ROWS)) + generator.normal(0, 0.2, size=(seeds, ROWS))
        seeds_part = generator.normal(0, 1 / np.sqrt(ROWS), size=(seeds, 1))
        found = paired_difference(np.zeros((seeds, ROWS)), truth + rows + seeds_part, np.ones(ROWS))
        hits += found.low <= truth <= found.high
    assert hits / tries > 0.9


def two(first, second, axis="lr=1e-4,1e-3", **more):
    runs = [[scores(first)], [scores(second)]]
    return report_of(
        parse_axis(axis, Settings()), runs, folder="runs/x", names=[["a"], ["b"]], paths={}, steps=5, diverged={}, **more
    )  # fmt: skip


def test_a_clear_best_is_picked_and_an_unclear_one_is_not():
    first = losses(1)
    clear, unclear = two(first + 0.5, first), two(first + np.random.default_rng(0).normal(0, 1, ROWS), first)
    assert (clear.pick, clear.close) == ("1e-3", ())
    assert unclear.pick is None
    assert set(unclear.close) == {"1e-4", "1e-3"}
    assert unclear.close[0] == unclear.reference


def test_few_rows_pick_nothing():
    first = losses(1, rows=10)
    found = two(first + 5, first)
    assert (found.pick, found.close) == (None, ("1e-3", "1e-4"))


def test_a_run_that_diverged_is_never_picked_and_hinders_no_pick():
    axis = parse_axis("lr=1e-4,1e-3,1", Settings())
    runs = [[scores(losses(1) + 1)], [scores(losses(1))], [None]]
    found = report_of(axis, runs, folder="f", names=[["a"], ["b"], ["c"]], paths={}, steps=5, diverged={"c": "no finite loss"})  # fmt: skip
    assert found.pick == "1e-3"
    assert (found.values[2].score, found.values[2].diverged) == (None, "no finite loss")
    with pytest.raises(DataError):
        report_of(axis, [[None]] * 3, folder="f", names=[["a"], ["b"], ["c"]], paths={}, steps=5, diverged={})


def test_bits_per_byte_are_of_rows_that_all_have_by_the_longest_text_of_each():
    ids = [f"a.jsonl:{row}" for row in range(4)]
    runs = [
        [scores([1.0, 2.0, 3.0, 4.0], ids=ids, num_bytes=[1, 2, 3, 4])],
        [scores([2.0, 3.0], ids=[ids[2], ids[0]], num_bytes=[2, 5])],
    ]
    found = gather(runs, Measure.BITS)
    assert (found.ids, found.left_out) == ((ids[0], ids[2]), 2)
    assert found.counts.tolist() == [5, 3]
    assert found.by_seed()[:, 0] == pytest.approx(np.array([4.0, 5.0]) / np.log(2) / 8)


def test_a_source_is_noise_where_the_rows_of_the_others_are_better_without_it():
    """What becomes of its own rows says nothing: they are far worse without it in either case."""
    names = ("good.jsonl", "noise.jsonl")
    axis = parse_axis("source=each-left-out", Settings(data=DataSettings(sources=names)))
    ids = [f"{names[row % 2]}:{row}" for row in range(ROWS)]
    own = np.array([row % 2 for row in range(ROWS)], dtype=bool)
    whole = losses(1)
    without_good = np.where(own, whole + 0.3, whole + 9)
    without_noise = np.where(own, whole + 9, whole - 0.3)
    runs = [[scores(nll, ids=ids)] for nll in (whole, without_good, without_noise)]
    paths = {name: (name,) for name in names}
    gathered, differences, reference = summarize(axis, runs, paths)
    assert gathered.by_seed()[2, 0] > gathered.by_seed()[0, 0]
    assert judge(axis, differences, reference).noise == ("noise.jsonl",)
    assert differences[1].rows == differences[2].rows == ROWS / 2
