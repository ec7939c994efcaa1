"""Whether a training has lost what earlier runs had taught the model, judged by the rows that these held out.

Rows are compared in pairs, each with itself before the first step. Where a good part of them was answered right, right answers
decide: more than a few have to be gone, and more than chance would take. Elsewhere, as with free text, the loss decides.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import comb

from sftcli.events import EarlierDone
from sftcli.figures import loss_figure
from sftcli.services.diagnosis.verdict import ERRORS, Again, Verdict

ANSWERED = 0.2  # share of right answers before, from which on answers decide
FEWER = 0.05  # of the rows: a share of right answers that falls by less is as it was
HIGHER = 0.1  # nats per token, above which a loss is another one
CHANCE = 0.025  # that as many of the changed answers, or more, changed for the worse


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The held-out rows of one earlier run, before the first step and with the final model."""

    first: EarlierDone
    last: EarlierDone

    @property
    def lost(self) -> float | None:
        """Share of the rows that were answered right before, and are not now; None where none was."""
        return self.last.lost / self.first.right if self.first.right else None

    @property
    def is_lost(self) -> bool:
        """Whether that run's task is gone, at least in part."""
        first, last = self.first, self.last
        if first.answered and first.right >= ANSWERED * first.answered:
            fall = (last.lost - last.gained) / first.answered
            return fall > FEWER and _chance(last.lost, last.gained) < CHANCE
        return last.rise > max(HIGHER, ERRORS * (last.rise_error or 0.0))

    def in_words(self) -> str:
        """Return ``the rows of RUN: held-out loss 0.030 -> 2.100, right 48 -> 0 of 60``."""
        first, last = self.first, self.last
        losses = f"{loss_figure(first.loss, first.rows)} -> {loss_figure(last.loss, last.rows)}"
        right = f", right {first.right:,} -> {last.right:,} of {last.answered:,}" if last.answered else ""
        return f"the rows of {first.run}: held-out loss {losses}{right}"


def kept_of(events: Iterable[EarlierDone]) -> list[Kept]:
    """Return what ``events``, in order of time, say of each earlier run: its last measurement beside the first one."""
    first: dict[str, EarlierDone] = {}
    last: dict[str, EarlierDone] = {}
    for event in events:
        if event.is_end:
            last[event.run] = event
        else:
            first.setdefault(event.run, event)
    return [Kept(first=first[run], last=found) for run, found in last.items() if run in first]


def judged_with(kept: Sequence[Kept], verdict: Verdict, again: Again) -> Verdict:
    """Return ``verdict`` on a run's own rows; or where it has lost what earlier runs had taught, that."""
    lost = [one.in_words() for one in kept if one.is_lost]
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
