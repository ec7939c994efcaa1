"""What became of the rows that earlier runs held out, read from the events of a run that trains on from them."""

from collections.abc import Iterable
from dataclasses import dataclass

from sftcli.events import EarlierDone
from sftcli.figures import loss_figure

NUMBERS = ("lost", "loss_rise")  # that a training can be failed by


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The held-out rows of one earlier run before the first step and with the final model. Losses are nats per response token."""

    run: str
    rows: int
    first_loss: float
    last_loss: float
    loss_rise: float
    loss_rise_error: float | None  # standard error over rows; None of few rows
    answered: int  # of the rows, those that are no text
    first_right: int
    last_right: int
    lost: int  # right before, and not now
    gained: int  # the other way round
    lost_fraction: float | None  # of those that were right before; None where none was

    def in_words(self) -> str:
        """Return ``the rows of RUN: held-out loss 0.030 -> 2.100, right 48 -> 0 of 60``."""
        losses = f"{loss_figure(self.first_loss, self.rows)} -> {loss_figure(self.last_loss, self.rows)}"
        right = f", right {self.first_right:,} -> {self.last_right:,} of {self.answered:,}"
        return f"the rows of {self.run}: held-out loss {losses}{right if self.answered else ''}"


def kept_of(events: Iterable[EarlierDone]) -> list[Kept]:
    """Return what ``events``, in order of time, say of each earlier run: its last measurement beside the first one."""
    first: dict[str, EarlierDone] = {}
    last: dict[str, EarlierDone] = {}
    for event in events:
        if event.is_end:
            last[event.run] = event
        else:
            first.setdefault(event.run, event)
    return [_compared(first[run], found) for run, found in last.items() if run in first]


def _compared(first: EarlierDone, last: EarlierDone) -> Kept:
    return Kept(
        run=first.run,
        rows=last.rows,
        first_loss=first.loss,
        last_loss=last.loss,
        loss_rise=last.rise,
        loss_rise_error=last.rise_error,
        answered=last.answered,
        first_right=first.right,
        last_right=last.right,
        lost=last.lost,
        gained=last.gained,
        lost_fraction=last.lost / first.right if first.right else None,
    )


def numbers_of(kept: Iterable[Kept]) -> dict[str, float]:
    """Return the worst of each of ``NUMBERS`` over the earlier runs, as far as they are known."""
    kept = list(kept)
    lost = [one.lost_fraction for one in kept if one.lost_fraction is not None]
    found = {"lost": lost, "loss_rise": [one.loss_rise for one in kept]}
    return {name: max(values) for name, values in found.items() if values}
