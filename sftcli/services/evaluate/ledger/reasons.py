"""Why rows are listed, from what they cost."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sftcli.services.report.ledger import Reason

Numbers = npt.NDArray[np.float64]

_TO_SIGMA = 1.4826
_FAR = 4.0  # spreads from the median
_LEAST_SPREAD = 0.1  # nats per token
_RISE = 0.1  # nats per token
_CLEAR_RISE = 2.0  # nats of the whole answer: of a short one a tenth of a nat per token is little
_BY_HEART = 0.1  # nats per token, at most
_BELOW_HELDOUT = 0.2  # of what half of the held-out rows cost at most
_FEWEST_HELDOUT = 20
_MOST_FOREIGN = 0.1  # of all rows
_LITTLE = 0.2  # of what the prompt of half of the rows saves at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What rows cost, in nats per token with loss, in their order: (rows,) each.

    ``before`` is of the model that the training began with, ``apart`` behind the prompt of another row; None without such a model.
    """

    tokens: Numbers
    is_heldout: npt.NDArray[np.bool_]
    after: Numbers
    after_apart: Numbers
    before: Numbers | None
    before_apart: Numbers | None

    @property
    def support_before(self) -> Numbers | None:
        """As ``support``, by the model that the training began with."""
        if self.before is None or self.before_apart is None:
            return None
        return (self.before_apart - self.before) * self.tokens

    @property
    def support_after(self) -> Numbers:
        """How many nats cheaper the answers of each row are behind their own prompt than behind another one."""
        return (self.after_apart - self.after) * self.tokens


def listed_by_cost(costs: Costs) -> list[dict[Reason, str]]:
    """Return for each row what its costs say against it, in words."""
    found: list[dict[Reason, str]] = [{} for _ in costs.tokens]
    for reason, judge in _JUDGES.items():
        is_found, words = judge(costs)
        for row in np.flatnonzero(is_found):
            found[row][reason] = words(int(row))
    return found


_Judged = tuple[npt.NDArray[np.bool_], Callable[[int], str]]


def _foreign(costs: Costs) -> _Judged:
    support = _support(costs)
    rank = np.argsort(np.argsort(support, kind="stable"))
    limit = max(0.0, _LITTLE * float(np.median(support)))
    # Where neither model has learned what prompts have to do with answers, half of all rows would be found.
    is_found = (support <= limit) & (rank < max(1, _MOST_FOREIGN * len(support)))
    before, after = costs.support_before, costs.support_after

    def words(row: int) -> str:
        told = "" if before is None else f"{before[row]:+.1f} nats for the base, "
        return f"what its own prompt saves against another row's: {told}{after[row]:+.1f} nats for the tuned model"

    return is_found, words


def _unsaid(costs: Costs) -> _Judged:
    limit = upper_limit(costs.after)
    is_found = costs.after > limit
    if costs.before is not None:
        is_found &= costs.after > costs.before / 2

    def words(row: int) -> str:
        return f"it still costs {costs.after[row]:.2f} nats per token, half of the rows at most {np.median(costs.after):.2f}"

    return is_found, words


def _risen(costs: Costs) -> _Judged:
    before = costs.after if costs.before is None else costs.before
    rise = costs.after - before

    def words(row: int) -> str:
        return f"its loss rose from {before[row]:.2f} to {costs.after[row]:.2f}"

    return (rise > _RISE) & (rise * costs.tokens > _CLEAR_RISE), words


def _by_heart(costs: Costs) -> _Judged:
    heldout = costs.after[costs.is_heldout]
    usual = float(np.median(heldout)) if len(heldout) >= _FEWEST_HELDOUT else 0.0
    is_found = ~costs.is_heldout & (costs.after < min(_BY_HEART, _BELOW_HELDOUT * usual))
    if costs.before is not None:
        is_found &= costs.before > usual  # else it was as cheap before anything was learned

    def words(row: int) -> str:
        return (
            f"it costs {costs.after[row]:.3f} nats per token, half of the held-out rows at least {usual:.2f}"
        )

    return is_found, words


def upper_limit(values: Numbers) -> float:
    """Return what hardly any of ``values`` would exceed if they were spread as their middle is."""
    middle = float(np.median(values))
    spread = max(_LEAST_SPREAD, _TO_SIGMA * float(np.median(np.abs(values - middle))))
    return middle + _FAR * spread


_JUDGES: dict[Reason, Callable[[Costs], _Judged]] = {
    Reason.FOREIGN_ANSWER: _foreign,
    Reason.UNSAID: _unsaid,
    Reason.RISEN: _risen,
    Reason.BY_HEART: _by_heart,
}


def order_of_doubt(costs: Costs) -> list[int]:
    """Return the rows, those first whose answers are most likely those of other rows."""
    return [int(row) for row in np.argsort(_support(costs), kind="stable")]


def _support(costs: Costs) -> Numbers:
    """Return what speaks for the answer of each row, (rows,) in nats per root of its tokens with loss.

    It is the logarithm of a likelihood ratio: of its own prompt against another one. That of the base and that of the tuned model
    are added, the latter less for training rows, the more these were learned by heart: a wrong answer that was learned with its
    prompt is likely behind it too. What chance adds grows with the root of the tokens, so that long answers have more of it.
    """
    roots = np.sqrt(costs.tokens)
    if costs.support_before is None:
        return costs.support_after / roots
    trust = np.where(costs.is_heldout, 1.0, _trust_in_training(costs))
    found: Numbers = (costs.support_before + trust * costs.support_after) / roots
    return found


def _trust_in_training(costs: Costs) -> float:
    """Return how much the tuned model can tell of its training rows: what they cost as a share of what held-out ones do, at most 1."""
    heldout, trained = costs.after[costs.is_heldout], costs.after[~costs.is_heldout]
    if not len(heldout) or not len(trained):
        return 0.0
    return float(min(1.0, np.median(trained) / max(float(np.median(heldout)), 1e-9)))
