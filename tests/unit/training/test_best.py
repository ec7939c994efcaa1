"""Which evaluation is the best, and when a run has had enough of them."""

import pytest

from sftcli.config.schema.training import TrainingSettings
from sftcli.training.loss import NllSum
from sftcli.training.state import TrainState
from sftcli.training.stopping import has_plateaued, with_heldout


def states(settings, *measured):
    """Yield the state after each evaluation, of (loss, score)."""
    state = TrainState()
    for step, (loss, score) in enumerate(measured):
        state = with_heldout(
            TrainState(**{**vars_of(state), "step": step}),
            NllSum(nll=loss, response_tokens=1, rows=1),
            settings,
            score=score,
        )
        yield state


def vars_of(state):
    return {name: getattr(state, name) for name in state.__slots__}


CHECK = {"metric_for_best": "check", "early_stopping_evals": 2, "early_stopping_improvement": 0.1}


@pytest.mark.parametrize(
    ("measured", "best", "stale"),
    [
        ([(3.0, 0.1), (2.0, 0.5), (1.0, 0.4)], 1, 1),  # a lower loss does not outweigh a lower score
        ([(3.0, 0.1), (4.0, 0.5)], 1, 0),
        ([(3.0, 0.5), (2.0, 0.5)], 1, 0),  # of equal scores the lower loss is better
        ([(3.0, 0.5), (2.95, 0.5)], 1, 1),  # and not by enough to go on for
        ([(3.0, 0.5), (3.5, 0.5), (float("nan"), 0.9)], 0, 2),
    ],
)
def test_a_check_decides_and_the_loss_between_equals(measured, best, stale):
    settings = TrainingSettings(max_steps=9, **CHECK)
    *_, last = states(settings, *measured)
    assert (last.best_step, last.stale_evals) == (best, stale)
    assert last.best_heldout_loss == measured[best][0]
    assert last.best_score == measured[best][1]
    assert has_plateaued(last, settings) == (stale == 2)


def test_where_the_loss_decides_scores_say_nothing():
    settings = TrainingSettings(max_steps=9, early_stopping_evals=2)
    *_, last = states(settings, (3.0, 0.1), (2.0, 0.2), (2.5, 0.9))
    assert (last.best_step, last.best_score, last.stale_evals) == (1, 0.2, 1)
    assert (last.first_score, last.last_score) == (0.1, 0.9)
