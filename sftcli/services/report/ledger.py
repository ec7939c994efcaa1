"""``rows.json``: what each row of a run cost before and after the training, and why some of them are worth a look."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from sftcli import storage
from sftcli.data.conversations.fixes_done import Fix
from sftcli.own_files import OwnFile
from sftcli.services.runs.folder import RunFolder

MOST_SHOWN = 100  # rows of each reason that are kept with their texts


class Reason(StrEnum):
    """Why a row is listed. The values are a published interface."""

    words: str

    FOREIGN_ANSWER = "foreign-answer", "answer fits other prompts as well"
    UNSAID = "unsaid", "still cannot say it"
    RISEN = "risen", "loss rose"
    BY_HEART = "by-heart", "learned by heart"
    CONTRADICTION = "contradiction", "same question, other answer"
    SCRIPT = "script", "other alphabet"
    FORMAT = "format", "other format"
    LENGTH = "length", "other length"

    def __new__(cls, value: str, words: str) -> "Reason":
        """Return the member of ``value``."""
        member = str.__new__(cls, value)
        member._value_, member.words = value, words
        return member


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLosses:
    """A row and what its answers cost, in nats per token with loss.

    ``apart_before`` and ``apart_after`` are of the same answers behind the prompt of another row. What is ``before`` is of the
    model that the training began with; None where there is none. ``row`` is the hash by which fixes name the row, empty where
    it has none. ``prompt`` and ``answer`` are of rows that are shown, cut; ``is_cut`` says whether of the answer something is left out.
    """

    split: str  # train or heldout
    source: str
    line: int
    row: str
    tokens: int  # with loss
    before: float | None
    after: float
    apart_before: float | None
    apart_after: float
    reasons: Mapping[str, str]  # by their names, each in words
    prompt: str = ""
    answer: str = ""
    is_cut: bool = False
    is_kept: bool = False  # a fix says that it is right as it is
    is_part: bool = False  # other trained answers of its row are elsewhere, or left out: a fix that replaces means the last of them

    @property
    def place(self) -> str:
        """The file and line that it came from."""
        return f"{self.source}:{self.line}"

    @property
    def is_shown(self) -> bool:
        """Whether it has its texts."""
        return bool(self.answer or self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLosses:
    """The losses of all scored rows of a source in one split, in nats per token with loss, as ``sft eval`` has them."""

    split: str
    source: str
    rows: int
    tokens: int
    before: float | None
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The rows of a run, those first that are most likely wrong."""

    model: str  # the tuned one, inside of the run
    model_hash: str
    base: str | None
    available: int  # rows that there are; some of them were drawn where ``rows`` has fewer
    seconds: float
    sources: tuple[SourceLosses, ...]
    rows: tuple[RowLosses, ...]
    fixes: tuple[Fix, ...] = ()  # which the rows were prepared with: what is decided now comes on top of them

    @property
    def counts(self) -> dict[Reason, int]:
        """How many rows there are of each reason that some row has."""
        found = Counter(name for row in self.rows for name in row.reasons)
        return {reason: found[reason] for reason in Reason if found[reason]}

    @property
    def shown(self) -> list[tuple[int, RowLosses]]:
        """The rows that have their texts, with their places in the ledger, from 1."""
        return [(place, row) for place, row in enumerate(self.rows, 1) if row.is_shown]

    @property
    def fixes_text(self) -> str:
        """The fixes as a page reads them, keys without a value left out."""
        return json.dumps([{key: value for key, value in asdict(one).items() if value} for one in self.fixes])

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return asdict(self) | {"counts": dict(self.counts)}


LEDGERS = OwnFile(form=Ledger, hint="make it again: sft report RUN --rows")


def read_ledger(run: RunFolder) -> Ledger | None:
    """Return the ledger of ``run``; None where there is none.

    Raises:
        DataError: The file is damaged.
    """
    return LEDGERS.find(run.ledger)


def write_ledger(run: RunFolder, ledger: Ledger) -> None:
    """Keep ``ledger`` with ``run``, for ``read_ledger``."""
    LEDGERS.write(run.ledger, ledger, kind=storage.OUTPUT)
