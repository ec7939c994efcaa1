"""Why rows are listed and in which order, from costs that are made for it."""

import numpy as np
import pytest

from sftcli.services.evaluate.ledger.reasons import Costs, listed_by_cost, order_of_doubt
from sftcli.services.report.ledger import Reason

ROWS, HELDOUT, TOKENS = 200, 40, 20
PLANTED = tuple(range(0, ROWS, 20))  # 5 %, two of them held out


def costs_of(*, heart: float, seed: int = 0, has_base: bool = True) -> Costs:
    """Return costs where the prompts of ``PLANTED`` save nothing for the base, and nothing for the tuned model unless learned by heart.

    ``heart`` is how much of each training row was: 1 is all of it, and the row costs nothing then, wrong or not.
    """
    random = np.random.default_rng(seed)
    is_heldout = np.arange(ROWS) >= ROWS - HELDOUT
    is_wrong = np.isin(np.arange(ROWS), PLANTED)
    apart = random.normal(3.0, 0.3, ROWS)
    saved = np.where(is_wrong, random.normal(0.0, 0.1, ROWS), random.normal(1.0, 0.2, ROWS))
    learned = np.where(is_wrong, 0.0, 1.0) + saved
    tuned = apart - learned
    return Costs(
        tokens=np.full(ROWS, float(TOKENS)),
        is_heldout=is_heldout,
        after=np.where(is_heldout, tuned, (1 - heart) * tuned),
        after_apart=apart + np.where(is_heldout, 0, random.normal(0.0, 0.5 * heart, ROWS)),
        before=apart - saved if has_base else None,
        before_apart=apart if has_base else None,
    )


@pytest.mark.parametrize("heart", [0.0, 0.5, 0.99])
def test_wrong_rows_come_first_also_where_all_were_learned_by_heart(heart):
    found = order_of_doubt(costs_of(heart=heart))
    assert set(found[: len(PLANTED)]) >= set(PLANTED[:-1])
    assert sorted(found) == list(range(ROWS))


def test_without_a_base_the_tuned_model_orders_them():
    found = order_of_doubt(costs_of(heart=0.0, has_base=False))
    assert set(found[: len(PLANTED)]) == set(PLANTED)


def test_at_most_a_tenth_is_listed_as_answers_of_other_rows():
    costs = costs_of(heart=0.0)
    nothing = Costs(
        tokens=costs.tokens, is_heldout=costs.is_heldout, after=costs.after, after_apart=costs.after,
        before=costs.after, before_apart=costs.after,
    )  # fmt: skip
    assert sum(Reason.FOREIGN_ANSWER in one for one in listed_by_cost(nothing)) == ROWS // 10
    listed = {row for row, one in enumerate(listed_by_cost(costs)) if Reason.FOREIGN_ANSWER in one}
    assert listed <= set(PLANTED)


def changed(row: int, **values: float) -> dict[Reason, str]:
    """Return why a row is listed whose costs are these, beside others that cost 2 before, and 1 after the training."""
    plain = {"after": 1.0, "after_apart": 3.0, "before": 2.0, "before_apart": 4.0}
    columns = {name: np.full(ROWS, value) for name, value in plain.items()}
    for name, value in values.items():
        columns[name][row] = value
    is_heldout = np.arange(ROWS) >= ROWS - HELDOUT
    return listed_by_cost(Costs(tokens=np.full(ROWS, float(TOKENS)), is_heldout=is_heldout, **columns))[row]


def test_each_reason_has_its_row():
    assert changed(0) == {}
    assert changed(0, after=1.8).keys() == {Reason.UNSAID}
    assert (
        changed(0, before=9.0, before_apart=9.0, after=1.8).keys() == set()
    )  # it fell as far as one could wish
    assert changed(0, before=0.8, after=1.0).keys() == {Reason.RISEN}
    assert changed(0, before=0.99, after=1.0).keys() == set()
    assert changed(0, after=0.01).keys() == {Reason.BY_HEART}
    assert changed(ROWS - 1, after=0.01).keys() == set()  # nobody learned a held-out row
    assert changed(0, before=0.02, after=0.01).keys() == set()  # it cost nothing before
    assert changed(0, before_apart=1.0, after_apart=1.0).keys() == {Reason.FOREIGN_ANSWER}
    assert changed(0, before_apart=2.2, after_apart=1.2).keys() == {Reason.FOREIGN_ANSWER}  # a tenth
    assert changed(0, before_apart=2.6, after_apart=1.6).keys() == set()  # three tenths of what others save


def test_a_reason_says_the_numbers_that_it_is_about():
    (words,) = changed(0, before=0.8, after=1.0).values()
    assert words == "its loss rose from 0.80 to 1.00"
    (words,) = changed(0, before_apart=1.0, after_apart=1.0).values()
    assert words == (
        "what its own prompt saves against another row's: -20.0 nats for the base, +0.0 nats for the tuned model"
    )
