"""What is known of prepared rows: the manifest beside them, and ``data.json`` of a run that trains on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from sftcli.data.conversations.fixes_done import FixesDone
from sftcli.data.quality.audit_summary import AuditSummary
from sftcli.own_files import OwnFile, Stamp
from sftcli.paths import PathText

_AGAIN = "prepare the data again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What must be the same when a model is asked: how its template writes a turn, and which tokens end an answer."""

    template: str
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AboutRows:
    """Where rows are from, how they were rendered, and what became of each."""

    sources: tuple[str, ...] = ()
    schemas: Mapping[str, str] = field(default_factory=dict)  # by source
    paths: Mapping[str, tuple[PathText, ...]] = field(default_factory=dict)  # the files of each source
    template: str = ""
    ends: Ends | None = None
    heldout_fraction: float | None = None  # None where held-out rows have sources of their own
    audit: Mapping[str, AuditSummary]  # by split
    fixes: FixesDone | None = None  # what became of them; None where there were none

    def to_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierPart:
    """How many rows of one run there are: replayed ones, and those that it held out."""

    run: PathText
    replayed: int
    replayable: int  # different rows that these are drawn from
    heldout: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AboutEarlier:
    """Rows of earlier runs: what they were asked for, and how many there are of each run."""

    asked: Mapping[str, object]
    parts: tuple[EarlierPart, ...]
    audit: AuditSummary  # of those that are replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What stands beside the files of prepared rows."""

    files: Mapping[str, Stamp]  # by name
    largest_ids: Mapping[str, int] = field(default_factory=dict)  # of the tokens of each split
    about: AboutEarlier | AboutRows


MANIFESTS = OwnFile(form=Manifest, version=10, oldest=10, hint=_AGAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRows(AboutRows):
    """The rows of a run; ``fingerprint`` is the hash of their files. Replayed ones count in the audit alone."""

    fingerprint: str = ""


RUN_ROWS = OwnFile(
    form=RunRows,
    hint="a start of the same training writes it again: sft train --config RUN/config.toml --run NAME; "
    "RUN/final can be named in place of RUN",
)
