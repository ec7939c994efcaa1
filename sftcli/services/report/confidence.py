"""Which answers can go out unread, as ``eval.json`` has it: for terminal, page and card alike."""

from dataclasses import dataclass

from sftcli.config.schema.training import Precision
from sftcli.figures import share_of

COLUMNS = ("sure at", "answered", "right", "wrong at most (95%)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The cut for a share of wrong answers; ``confidence`` is None where no cut holds it."""

    wrong_at_most: float
    confidence: float | None
    answered: int  # held-out rows at or above the cut
    right: int  # of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """The cuts of one model over its answers; there are none where the answers are too few."""

    measure: str  # by which an answer is right: "exact match", or a check
    precision: Precision  # that the answers were computed in: others move the confidence
    model: str  # the folder of the model in its run
    model_hash: str  # of what is in that folder: another model has other confidences
    rows: int  # that were answered
    cuts: tuple[Cut, ...]

    @property
    def choices(self) -> tuple[Cut, ...]:
        """The cuts that exist; of those at one confidence only that with the lowest share of wrong answers."""
        found = {cut.confidence: cut for cut in reversed(self.cuts) if cut.confidence is not None}
        return tuple(reversed(found.values()))

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The cuts that can be chosen from, the strictest first, as text for each of ``COLUMNS``."""
        return [
            (
                f"{cut.confidence:.5f}",
                share_of(cut.answered, self.rows),
                f"{cut.right:,}",
                f"{cut.wrong_at_most:.0%}",
            )
            for cut in self.choices
        ]

    @property
    def sentence(self) -> str:
        """The strictest cut in one sentence; "" where there is none."""
        for cut in self.choices:
            return (
                f"At a confidence of {cut.confidence:.5f} or more, {share_of(cut.answered, self.rows)} held-out answers go "
                f"out, at most {cut.wrong_at_most:.0%} of them wrong (95% certainty, {self.measure})"
            )
        return ""
