"""The cut in confidence keeps its promise on new answers, finds what there is to find, and finds nothing in noise."""

import numpy as np
import pytest

from sftcli.services.evaluate.confidence import (
    FEWEST_ROWS,
    GRID,
    WRONG_SHARES,
    binomial_tail,
    fewest_without_error,
    find_cuts,
)

SETS = 1000
# How the logit of the confidence lies, where that of being right lies, and the spread of both: from sure and right to poor.
WORLDS = [(3.0, 2.0, 2.0), (4.0, 3.0, 3.0), (2.0, 1.0, 1.5), (5.0, 4.0, 1.0)]


def logistic(values):
    return 1 / (1 + np.exp(-values))


def answers_of(world, rows, generator):
    """Draw answers: their confidence, and the probability that each is right."""
    sure, right, spread = world
    noise = generator.normal(size=rows) * spread
    return logistic(sure + noise), logistic(right + noise)


def true_wrong_share(world):
    """Return, for each cut of the grid, which share of a great many answers above it is wrong."""
    confidence, right = answers_of(world, 400_000, np.random.default_rng(1))
    return {cut: float((1 - right)[confidence >= cut].mean()) for cut in GRID if (confidence >= cut).any()}


@pytest.mark.parametrize("world", WORLDS)
def test_the_promise_holds_in_94_of_100_sets_of_rows(world):
    truth = true_wrong_share(world)
    generator = np.random.default_rng(2)
    broken = dict.fromkeys(WRONG_SHARES, 0)
    for _ in range(SETS):
        confidence, right = answers_of(world, 200, generator)
        for cut in find_cuts(confidence, generator.random(200) < right):
            if cut.confidence is not None:
                broken[cut.wrong_at_most] += truth[cut.confidence] > cut.wrong_at_most
    assert max(broken.values()) <= 0.06 * SETS, broken


def test_most_of_what_could_go_out_goes_out():
    generator = np.random.default_rng(3)
    world = WORLDS[1]
    truth = true_wrong_share(world)
    confidence, right = answers_of(world, 500, generator)
    best = min(cut for cut, share in truth.items() if share <= 0.05)
    (cut,) = [
        one for one in find_cuts(confidence, generator.random(500) < right) if one.wrong_at_most == 0.05
    ]
    assert cut.answered >= 0.7 * (confidence >= best).sum()
    assert cut.answered - cut.right <= 0.05 * cut.answered


def test_shuffled_confidence_gains_nothing():
    """Where confidence says nothing, no cut has fewer wrong answers than all rows have."""
    generator = np.random.default_rng(4)
    confidence, right = answers_of(WORLDS[0], 500, generator)
    is_right = generator.random(500) < right
    wrong = 1 - is_right.mean()
    assert any(
        cut.wrong_at_most < wrong for cut in find_cuts(confidence, is_right) if cut.confidence is not None
    )
    found = [
        cut
        for _ in range(40)
        for cut in find_cuts(generator.permutation(confidence), is_right)
        if cut.confidence is not None and cut.wrong_at_most < wrong
    ]
    assert len(found) <= 2 * 5  # of 40 times the shares below it, one in twenty each


def test_few_rows_have_no_cut():
    assert find_cuts([0.99] * (FEWEST_ROWS - 1), [True] * (FEWEST_ROWS - 1)) == ()
    assert find_cuts([0.99] * FEWEST_ROWS, [True] * FEWEST_ROWS)


def test_all_right_answers_go_out_once_there_are_enough():
    for share in WRONG_SHARES:
        enough = max(FEWEST_ROWS, fewest_without_error(share))
        (cut,) = [one for one in find_cuts([0.9] * enough, [True] * enough) if one.wrong_at_most == share]
        assert (cut.confidence, cut.answered, cut.right) == (0.0, enough, enough)
    fewer = fewest_without_error(0.01) - 1
    assert find_cuts([0.9] * fewer, [True] * fewer)[0].confidence is None


def test_the_tail_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for wrong, rows, share in ((0, 59, 0.05), (3, 200, 0.02), (40, 500, 0.1), (0, 1, 0.2)):
        assert binomial_tail(wrong, rows, share) == pytest.approx(
            stats.binom.cdf(wrong, rows, share), rel=1e-9
        )
