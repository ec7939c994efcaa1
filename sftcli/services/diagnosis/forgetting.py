"""Whether a training has lost what earlier runs had taught the model, judged by the rows that these held out.

Rows are compared in pairs, each with itself before the first step. Where a good part of them was answered right, right answers
decide: more than a few have to be gone, and more than chance would take. Elsewhere, as with free text, the loss decides.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import comb

from sftcli.services.diagnosis.verdict import ERRORS, Again, Verdict
from sftcli.services.runs.earlier import Kept

ANSWERED = 0.2  # share of right answers before, from which on answers decide
FEWER = 0.05  # of the rows: a share of right answers that falls by less is as it was
HIGHER = 0.1  # nats per token, above which a loss is another one
CHANCE = 0.025  # that as many of the changed answers, or more, changed for the worse


def is_lost(kept: Kept) -> bool:
    """Return whether the task of an earlier run is gone, at least in part."""
    if kept.answered and kept.first_right >= ANSWERED * kept.answered:
        fall = (kept.lost - kept.gained) / kept.answered
        return fall > FEWER and _chance(kept.lost, kept.gained) < CHANCE
    return kept.loss_rise > max(HIGHER, ERRORS * (kept.loss_rise_error or 0.0))


def judged_with(kept: Sequence[Kept], verdict: Verdict, again: Again) -> Verdict:
    """Return ``verdict`` on a run's own rows; or where it has lost what earlier runs had taught, that."""
    lost = [one.in_words() for one in kept if is_lost(one)]
    if not lost:
        return verdict
    return replace(
        verdict,
        kind="forgetting",
        reason=f"{'; '.join(lost)}; on its own rows it is {verdict.kind}: {verdict.reason}",
        advice=f"replay rows of the earlier run: {again.command(again.more_replay())}",
    )


def _chance(lost: int, gained: int) -> float:
    """Return how likely it is that of the answers that changed so many or more got worse, if both ways are alike."""
    changed = lost + gained
    return sum(comb(changed, worse) for worse in range(lost, changed + 1)) / 2.0**changed
