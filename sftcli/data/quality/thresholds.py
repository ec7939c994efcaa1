"""Whether prepared rows are good enough for whoever asked: limits on shares of rows, and what is over them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from sftcli.config.schema.data import DataSettings
from sftcli.data.conversations.messages import RejectReason
from sftcli.data.example import CUTS, TROUBLES, RowFlag
from sftcli.data.quality.audit_summary import AuditSummary
from sftcli.errors import DataError, ThresholdError

MOST_UNFIT = 0.1  # of all rows: more of them are no slips, but the wrong file, columns or template


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """A limit: its setting, what it counts among ``all`` rows, and the first few of them."""

    what: str
    key: str  # the setting of ``data`` that limits its share
    count: Callable[[AuditSummary], int]
    all: Callable[[AuditSummary], int]
    named: Callable[[AuditSummary], Sequence[str]]
    is_strict: bool = True  # none is allowed with ``strict`` where the limit is unset

    def limit(self, data: DataSettings) -> float | None:
        """Return the largest share that ``data`` allows."""
        found = getattr(data, self.key)
        if found is None and data.strict and self.is_strict:
            return 0.0
        return None if found is None else float(found)

    def shares(self, audits: Sequence[AuditSummary]) -> tuple[int, int]:
        """Return how many of how many rows these are."""
        return sum(map(self.count, audits)), sum(map(self.all, audits))

    def enough(self, audits: Sequence[AuditSummary]) -> str:
        """Return the flag that allows as many as there are, rounded up."""
        count, total = self.shares(audits)
        share = next(percent / 100 for percent in range(101) if count <= percent / 100 * total)
        return f"--set data.{self.key}={share:g}"


def _flagged(audit: AuditSummary, flags: frozenset[RowFlag]) -> list[str]:
    return list(
        chain.from_iterable(audit.flagged_rows.get(flag.value, ()) for flag in RowFlag if flag in flags)
    )


_REJECTED = "rejected"
# Of which a file may have any number: what keeps them is known, or they are bad by their own words.
_EXPECTED = (RejectReason.TOO_LONG.value, RejectReason.LABELED_BAD.value)
_CHECKS = (
    _Check(
        what=_REJECTED,
        key="max_rejected_fraction",
        count=lambda audit: audit.rows - audit.kept,
        all=lambda audit: audit.rows,
        named=lambda audit: list(chain.from_iterable(audit.rejected_rows.values())),
    ),
    _Check(
        what="cut",
        key="max_cut_fraction",
        count=lambda audit: audit.cut_rows,
        all=lambda audit: audit.kept,
        named=lambda audit: _flagged(audit, CUTS),
    ),
    _Check(
        what="equal to an earlier row",
        key="max_duplicate_fraction",
        count=lambda audit: audit.duplicate_rows,
        all=lambda audit: audit.kept,
        named=lambda audit: audit.duplicates["exact"],
    ),
    _Check(
        what="nearly equal to an earlier row",
        key="max_near_duplicate_fraction",
        count=lambda audit: audit.near_duplicate_rows,
        all=lambda audit: audit.kept,
        named=lambda audit: audit.duplicates["near"],
        is_strict=False,
    ),
    _Check(
        what="with encoding trouble",
        key="max_trouble_fraction",
        count=lambda audit: audit.trouble_rows,
        all=lambda audit: audit.kept,
        named=lambda audit: _flagged(audit, TROUBLES),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitness:
    """Whether rows are good enough.

    ``exceeded`` has a sentence for each limit that they are over, ``unfit`` one about too many rows that cannot be
    trained on, where there is no limit. ``remedy`` says what to do about most rows that are left out, where they are
    too many. ``allowing`` are the flags with which all of them pass; none where no row would be left.
    """

    exceeded: tuple[str, ...]
    unfit: str
    remedy: str
    allowing: str

    @property
    def is_good(self) -> bool:
        """Whether the rows may be trained on."""
        return not self.exceeded and not self.unfit

    def require(self) -> None:
        """See that the rows may be trained on.

        Raises:
            DataError: Too many of them are unfit.
            ThresholdError: They are over a limit; the message names all of them.
        """
        if self.unfit:
            raise DataError(
                f"{self.unfit}; at most {MOST_UNFIT:.0%} may be rejected by default",
                hint=self._hint(self.remedy),
            )
        if self.exceeded:
            raise ThresholdError(
                f"the rows exceed the limits: {'; '.join(self.exceeded)}",
                hint=self._hint(self.remedy or "fix or remove these rows"),
            )

    def _hint(self, remedy: str) -> str:
        return f"{remedy}, or raise the limit: {self.allowing}" if self.allowing else remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Rows that are not trained on: how many of how many, why, the first of each reason, and what would keep most of them."""

    rows: int
    of: int
    reasons: Mapping[str, int]
    examples: Mapping[str, str]
    remedy: str

    def __str__(self) -> str:
        why = "; ".join(
            f"{reason} {count}, {self.examples[reason]}" for reason, count in self.reasons.items()
        )
        are = "row is" if self.of == 1 else "rows are"
        return f"{self.rows} of {self.of} {are} left out ({why}); {self.remedy}"


def left_out(audits: Sequence[AuditSummary]) -> LeftOut | None:
    """Return what is said about rows that are left out; None where all are kept."""
    reasons = _rejected(audits)
    if not reasons:
        return None
    return LeftOut(
        rows=reasons.total(),
        of=sum(audit.rows for audit in audits),
        reasons=dict(reasons.most_common()),
        examples=_first_rows(audits),
        remedy=remedy_for(audits, reasons),
    )


def assess_rows(audits: Sequence[AuditSummary], data: DataSettings) -> Fitness:
    """Return whether the rows of ``audits`` together are good enough for ``data``."""
    reasons = _rejected(audits)
    unfit = _find_unfit(audits, data)
    if unfit:
        reasons = _unexpected(reasons)
    exceeded = _find_exceeded(audits, data)
    are_many = unfit or _REJECTED in exceeded
    limiting = [*(_CHECKS[:1] if unfit else ()), *_over_limit(audits, data)]
    has_rows = any(audit.kept for audit in audits)
    return Fitness(
        exceeded=tuple(exceeded.values()),
        unfit=unfit,
        remedy=remedy_for(audits, reasons) if are_many else "",
        allowing=" ".join(check.enough(audits) for check in limiting) if has_rows else "",
    )


def _rejected(audits: Sequence[AuditSummary]) -> Counter[str]:
    return sum((Counter(audit.rejected) for audit in audits), Counter[str]())


def _unexpected(reasons: Counter[str]) -> Counter[str]:
    return Counter({reason: count for reason, count in reasons.items() if reason not in _EXPECTED})


def _over_limit(audits: Sequence[AuditSummary], data: DataSettings) -> list[_Check]:
    found = []
    for check in _CHECKS:
        limit, (count, total) = check.limit(data), check.shares(audits)
        if limit is not None and count > limit * total:
            found.append(check)
    return found


def _find_exceeded(audits: Sequence[AuditSummary], data: DataSettings) -> dict[str, str]:
    """Return a sentence for every limit of ``data`` that ``audits`` together are over."""
    found = dict[str, str]()
    for check in _over_limit(audits, data):
        limit, (count, total) = check.limit(data), check.shares(audits)
        allowed = f"at most {limit:.2%} may be" if limit else "none may be"
        example = next(chain.from_iterable(map(check.named, audits)), "")
        found[check.what] = f"{count} of {total} rows are {check.what} ({allowed}), such as {example}"
    shared = sum(audit.shared_prompts for audit in audits)
    if data.strict and shared:
        found["shared"] = f"{shared} held-out rows have a prompt that is also trained on"
    return found


def _find_unfit(audits: Sequence[AuditSummary], data: DataSettings) -> str:
    """Return a sentence about rows that cannot be trained on, where they are too many and the user set no limit; else nothing.

    Rows that are only too long, or labeled as bad, do not count.
    """
    if data.strict or data.max_rejected_fraction is not None:
        return ""
    reasons = _unexpected(_rejected(audits))
    total = sum(audit.rows for audit in audits)
    if reasons.total() <= MOST_UNFIT * total:
        return ""
    return f"{reasons.total()} of {total} rows cannot be trained on ({reasons_with_rows(audits, reasons)})"


def reasons_with_rows(audits: Sequence[AuditSummary], reasons: Counter[str]) -> str:
    """Return why rows were rejected, the most frequent reason first, each with its count in ``reasons`` and its first row."""
    first = _first_rows(audits)
    return "; ".join(f"{reason} {count}, {first[reason]}" for reason, count in reasons.most_common())


def _first_rows(audits: Sequence[AuditSummary]) -> dict[str, str]:
    return {reason: rows[0] for audit in reversed(audits) for reason, rows in audit.rejected_rows.items()}


def remedy_for(audits: Sequence[AuditSummary], reasons: Counter[str]) -> str:
    """Return what to do about the most frequent of ``reasons``; nothing where there are none."""
    for reason, _ in reasons.most_common(1):
        if reason == RejectReason.TOO_LONG and (enough := _enough_tokens(audits)):
            return f"--max-tokens {enough} keeps 99 % of them; --overlong truncate cuts them"
        return next(audit.remedies[reason] for audit in audits if reason in audit.remedies)
    return ""


def _enough_tokens(audits: Sequence[AuditSummary]) -> int:
    """Return the limit that keeps nearly all rows; 0 where the one they have does already."""
    enough = max(audit.max_tokens_for_99_percent for audit in audits)
    return enough if enough > audits[0].max_tokens else 0
