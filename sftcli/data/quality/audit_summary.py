"""What became of rows, as values: what an audit counts, a store keeps, and screen and page show. Needs no numpy."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """Rows with at most ``max_tokens`` tokens and more than the bin before."""

    max_tokens: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts:
    """What became of the rows of one source; token counts are of kept ones."""

    rows: int = 0
    kept: int = 0
    rejected: int = 0
    cut: int = 0
    tokens: int = 0
    response_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSummary:
    """The counts. Token counts are of kept rows; lengths are of all rows that could be tokenized, before any was cut.

    ``rejected`` is reason -> rows, ``rejected_rows`` the first few of each as ``file:line: what was found``, ``remedies`` what
    to do about most of them. ``flags`` is what was noticed about kept rows -> rows. ``max_tokens_for_99_percent`` is the limit that 99 % of the rows that
    could be tokenized fit into, 0 where there are none.
    """

    rows: int = 0
    kept: int = 0
    # Rows that were left out because the user asked for it, which are not among `rows`.
    excluded: Mapping[str, int] = field(default_factory=dict)
    excluded_rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    rejected_rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    remedies: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    thinking_tokens: int = 0  # of these, those of thinking
    trained_turns: int = 0
    untrained_rows: int = 0  # kept, and without any token that has loss
    cut_rows: int = 0  # kept, and cut for their length; `flags` says where
    cut_tokens: int = 0  # that they lost
    sources: Mapping[str, SourceCounts] = field(default_factory=dict)
    duplicate_rows: int = 0  # kept, and equal to an earlier one
    near_duplicate_rows: int = 0  # kept, and nearly equal to an earlier one
    near_trained_rows: int = 0  # held out, and equal or nearly equal to one that is trained on
    trouble_rows: int = 0  # kept, and with unreadable, misread or control characters
    shared_prompts: int = 0  # held out, with a first user text that is trained on too
    duplicates: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # the first few pairs of each of the three kinds
    flagged_rows: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # the first few of each of `flags`
    length_percentiles: Mapping[str, int] = field(default_factory=dict)
    length_histogram: Sequence[LengthBin] = ()
    longest_tokens: int = 0
    longest_row: str = ""
    max_tokens_for_99_percent: int = 0
    flags: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, object]:
        """Return the same as numbers, strings, lists and dicts."""
        return asdict(self)
