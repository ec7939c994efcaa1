"""When the task of an earlier run counts as lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.config.schema.settings import Settings
from sftcli.services.diagnosis.forgetting import is_lost, judged_with
from sftcli.services.diagnosis.verdict import Again, Verdict
from sftcli.services.runs.earlier import Kept, numbers_of
from sftcli.services.runs.folder import RunFolder

GOOD = Verdict(kind="good", reason="held-out loss fell from 2.000 to 1.000", advice="")


def kept(
    right: int = 48,
    lost: int = 0,
    gained: int = 0,
    *,
    rows: int = 60,
    rise: float = 0.0,
    error: float | None = 0.01,
) -> Kept:
    return Kept(
        run="first", rows=rows, first_loss=0.03, last_loss=0.03 + rise, loss_rise=rise, loss_rise_error=error,
        answered=rows, first_right=right, last_right=right - lost + gained, lost=lost, gained=gained,
        lost_fraction=lost / right if right else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (kept(lost=48, rise=2.0), True),
        (kept(lost=3, rise=2.0), False),  # 5 % of the rows: as it was, whatever the loss
        (kept(lost=9, gained=5), False),  # more went than came, and no more than chance
        (kept(lost=9), True),
        (kept(right=8, lost=8, rows=8), True),  # of few rows too, where all are gone
        (kept(right=8, lost=3, rows=8), False),  # of few rows this may be chance
        (kept(right=3, lost=3, rise=0.05), False),  # hardly any was right: the loss decides
        (kept(right=0, rise=0.5), True),
        (kept(right=0, rise=0.5, error=0.3), False),  # rows that scatter so much do not tell
        (kept(right=0, rise=-0.5), False),
    ],
)
def test_a_task_is_lost_by_answers_or_else_by_loss(found, expected):
    assert is_lost(found) is expected


@given(lost=st.integers(0, 60), gained=st.integers(0, 60))
def test_answers_that_change_both_ways_alike_are_never_a_loss(lost, gained):
    """The exact sign test, against the coins thrown one after the other."""
    chances = [1.0]
    for _ in range(lost + gained):
        chances = [(one + other) / 2 for one, other in zip([*chances, 0], [0, *chances], strict=True)]
    is_chance = sum(chances[lost:]) >= 0.025
    found = is_lost(kept(right=60, lost=lost, gained=gained, rows=120, rise=9.0))
    assert found == (not is_chance and lost - gained > 6)
    if gained >= lost:
        assert not found


def test_a_run_that_lost_a_task_is_never_good(tmp_path):
    again = Again(run=RunFolder(tmp_path / "second"), settings=Settings())
    verdict = judged_with([kept(), kept(lost=48, rise=2.07)], GOOD, again)
    assert verdict.kind == "forgetting"
    assert verdict.reason == (
        "the rows of first: held-out loss 0.030 -> 2.100, right 48 -> 0 of 60; "
        "on its own rows it is good: held-out loss fell from 2.000 to 1.000"
    )
    assert verdict.advice.endswith("--run second-2 --replay 20%")
    assert judged_with([kept()], GOOD, again) == GOOD


def test_of_several_runs_the_worst_counts_and_what_was_not_measured_is_left_out():
    assert numbers_of([kept(lost=12, rise=0.1), kept(lost=24, rise=0.05)]) == {"lost": 0.5, "loss_rise": 0.1}
    assert numbers_of([kept(right=0, rise=0.2)]) == {"loss_rise": 0.2}
    assert numbers_of([]) == {}
