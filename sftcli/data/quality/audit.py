"""What became of the rows: how many are trained on, on how much of each, and why the others are not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

import numpy as np

from sftcli.data.conversations.messages import Rejected, RejectReason
from sftcli.data.conversations.remedies import remedy_of
from sftcli.data.example import TROUBLES, Example, RowFlag, TooLong
from sftcli.data.quality.audit_summary import AuditSummary, LengthBin, SourceCounts
from sftcli.data.quality.duplicates import Duplicates
from sftcli.data.reading.record import Origin

ROWS_NAMED = 5  # of each reason
KEPT_SHARE = 0.99
PERCENTILES = (50, 90, 95, 99)
SMALLEST_BIN = 32

_FLAG_NOTES: Mapping[RowFlag, str] = {
    RowFlag.CONTROL_TEXT: "in {rows} a message contains the text of a control token; it stays text",
    RowFlag.CONTROL_WRITTEN: "in {rows} a message contains control tokens, as data.control_tokens_from allows",
    RowFlag.STOP_TEXT: "in {rows} an answer ends in the text of a stop token, which is trained as text (--strip-stop-text takes it away)",
    RowFlag.STOP_STRIPPED: "in {rows} the text of a stop token at the end of answers is taken away",
    RowFlag.STRIPPED: "in {rows} the template strips white space around messages; they are trained stripped",
    RowFlag.NORMALIZED: "in {rows} the tokenizer normalizes the Unicode of answers; they are trained normalized",
    RowFlag.THINKING: "thinking: {rows}, {thinking} of trained tokens",
    RowFlag.THOUGHT_WRITTEN: "in {rows} the thinking stands in the answer as <think>...</think>: the template has no place for it",
    RowFlag.PROMPT_JOINED: "in {rows} the template shows the answer after another text than the generation prompt; it is trained after"
    " the generation prompt",
    RowFlag.SPLIT_TEXT: "{rows} with a piece of a text that is longer than a row; nothing of it was left out",
    RowFlag.SPLIT_TURNS: "{rows} with one answer each, from rows with several: the template shows earlier answers otherwise than it"
    " prompts for them, or --train-on each",
    RowFlag.THOUGHT_DROPPED: "in {rows} the template leaves out the thinking of turns that are not trained",
    RowFlag.THOUGHT_SPACED: "in {rows} the template changes the white space around the thinking; it is trained as changed",
    RowFlag.TOOLS_DROPPED: "in {rows} the template does not show the tools that the row lists",
    RowFlag.LEAD_TRAINED: "in {rows} the template puts text before the answer that the generation prompt lacks; it is trained"
    " (--thinking drop leaves an empty thought without loss)",
    RowFlag.STOP_APPENDED: "in {rows} the template ends the last answer without a stop token; one is added and trained",
    RowFlag.TRAILING_TURNS: "in {rows} the turns after the last answer are dropped, because nothing answers them",
    RowFlag.UNREADABLE: "{rows} with U+FFFD, which stands for bytes that could not be decoded",
    RowFlag.MISREAD: "{rows} with text that looks like UTF-8 decoded as Latin-1 or Windows-1252",
    RowFlag.CONTROL_CHARACTER: "{rows} with control characters other than tab and line ends",
    RowFlag.CUT_TURNS: "from {rows} whole turns at the end are cut off",
    RowFlag.CUT_ANSWER: "from {rows} the end of an answer is cut off, with its stop token",
    RowFlag.CUT_STOP: "from {rows} the stop token of an answer is cut off; the answer is whole",
    RowFlag.CUT_END: "from {rows} only the template's text after the last answer is cut off",
}


class Excluded(StrEnum):
    """Why a row is left out that could be trained on: the user asked for it. The values are a published interface."""

    WHERE = "where"
    FIX = "fix"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"


TITLES = {
    "train": "training rows",
    "replayed": "replayed rows",
    "heldout": "held-out rows",
    "text": "plain text",
}  # of the parts of the rows, for people

_EXCLUDED_NOTES: Mapping[Excluded, str] = {
    Excluded.WHERE: "{rows} left out by --where",
    Excluded.FIX: "{rows} left out by --fixes, such as {example}",
    Excluded.DUPLICATE: "{rows} equal to another one left out, such as {example}; the seed draws which one stays",
    Excluded.NEAR_DUPLICATE: "{rows} nearly equal to another one left out, such as {example}; the seed draws which one stays",
}


class SupervisionAudit:
    """Counts rows as they come; what it keeps does not grow with their number.

    Args:
        max_tokens: The limit that the rows were rendered with.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._notes: list[str] = []
        self._kept = self._total = self._response = self._thinking = self._turns = self._untrained = 0
        self._excluded = Counter[str]()
        self._excluded_rows: dict[str, list[str]] = {}
        self._rejected = Counter[str]()
        self._rejected_rows: dict[str, list[str]] = {}
        self._remedies: dict[str, Counter[str]] = {}
        self._cut_rows = self._cut_tokens = self._shared_prompts = self._trouble_rows = 0
        self._sources: dict[str, Counter[str]] = {}
        self._duplicates = Duplicates()
        self._flagged_rows: dict[RowFlag, list[str]] = {}
        self._flags = Counter[RowFlag]()
        self._lengths = Counter[int]()
        self._longest = (0, "")

    def add(self, result: Example | Rejected, *, source: str = "") -> None:
        """Count one row of ``source``."""
        counts = self._sources.setdefault(source, Counter[str]())
        counts["rows"] += 1
        if isinstance(result, Rejected):
            counts["rejected"] += 1
            self._rejected[result.reason.value] += 1
            named = self._rejected_rows.setdefault(result.reason.value, [])
            if len(named) < ROWS_NAMED:
                named.append(str(result))
            remedy = remedy_of(result)
            self._remedies.setdefault(result.reason.value, Counter())[remedy] += 1
            if isinstance(result, TooLong):
                self._add_length(result.num_tokens, str(result.origin))
            return
        trained = int(np.count_nonzero(result.loss_mask))
        counts["kept"] += 1
        counts["tokens"] += len(result.input_ids)
        counts["response_tokens"] += trained
        counts["cut"] += bool(result.num_cut)
        self._kept += 1
        self._total += len(result.input_ids)
        self._response += trained
        self._thinking += result.thinking_tokens
        self._untrained += trained == 0
        self._turns += result.num_trained_turns
        self._cut_rows += bool(result.num_cut)
        self._trouble_rows += not TROUBLES.isdisjoint(result.flags)
        self._cut_tokens += result.num_cut
        for flag in result.flags:
            self._flags[flag] += 1
            named = self._flagged_rows.setdefault(flag, [])
            if len(named) < ROWS_NAMED:
                named.append(str(result.origin))
        self._add_length(len(result.input_ids) + result.num_cut, str(result.origin))

    def exclude(self, reason: Excluded, named: str = "", *, count: int = 1) -> None:
        """Count rows that are left out because the user asked for it."""
        self._excluded[reason.value] += count
        if named and len(rows := self._excluded_rows.setdefault(reason.value, [])) < ROWS_NAMED:
            rows.append(named)

    def add_duplicates(self, duplicates: Duplicates) -> None:
        """Take what was found out when all rows were there."""
        self._duplicates = duplicates

    def add_shared_prompts(self, count: int) -> None:
        """Take the number of held-out rows whose prompt is trained on."""
        self._shared_prompts = count

    def note(self, text: str) -> None:
        """Keep a sentence that a person should read beside the counts."""
        if text and text not in self._notes:
            self._notes.append(text)

    def summary(self) -> AuditSummary:
        """Return what was counted so far."""
        rejected = dict(sorted(self._rejected.items(), key=lambda item: (-item[1], item[0])))
        flags = {flag: self._flags[flag] for flag in RowFlag if self._flags[flag]}
        flag_notes = [
            text.format(
                rows=_rows(self._flags[flag]), thinking=f"{self._thinking / max(1, self._response):.0%}"
            )
            for flag, text in _FLAG_NOTES.items()
            if self._flags[flag]
        ]
        return AuditSummary(
            rows=self._kept + self._rejected.total(),
            kept=self._kept,
            excluded=dict(self._excluded),
            excluded_rows={reason: tuple(rows) for reason, rows in self._excluded_rows.items()},
            rejected=rejected,
            rejected_rows={reason: tuple(self._rejected_rows[reason]) for reason in rejected},
            remedies={reason: self._remedies[reason].most_common(1)[0][0] for reason in rejected},
            max_tokens=self._max_tokens,
            tokens=self._total,
            prompt_tokens=self._total - self._response,
            response_tokens=self._response,
            thinking_tokens=self._thinking,
            trained_turns=self._turns,
            untrained_rows=self._untrained,
            cut_rows=self._cut_rows,
            cut_tokens=self._cut_tokens,
            sources={source: SourceCounts(**counts) for source, counts in self._sources.items()},
            duplicate_rows=self._duplicates.exact,
            near_duplicate_rows=self._duplicates.near,
            near_trained_rows=self._duplicates.near_trained,
            trouble_rows=self._trouble_rows,
            shared_prompts=self._shared_prompts,
            duplicates={
                "exact": _pairs(self._duplicates.exact_examples),
                "near": _pairs(self._duplicates.near_examples),
                "near-trained": _pairs(self._duplicates.trained_examples),
            },
            flagged_rows={flag.value: tuple(self._flagged_rows[flag]) for flag in flags},
            length_percentiles={str(p): _at_share(self._lengths, p / 100) for p in PERCENTILES},
            length_histogram=_histogram(self._lengths),
            longest_tokens=self._longest[0],
            longest_row=self._longest[1],
            max_tokens_for_99_percent=_at_share(self._lengths, KEPT_SHARE),
            flags={flag.value: count for flag, count in flags.items()},
            notes=(*self._notes, *self._excluded_notes(), *flag_notes, *self._length_notes()),
        )

    def _excluded_notes(self) -> list[str]:
        return [
            _EXCLUDED_NOTES[reason].format(
                rows=_rows(self._excluded[reason]),
                example=next(iter(self._excluded_rows.get(reason, ())), ""),
            )
            for reason in Excluded
            if self._excluded[reason]
        ]

    def _length_notes(self) -> list[str]:
        dropped = self._rejected[RejectReason.TOO_LONG]
        parts = [f"{_rows(dropped)} longer than {self._max_tokens} tokens left out"] if dropped else []
        if self._cut_rows:
            parts.append(f"{_rows(self._cut_rows)} cut to {self._max_tokens} tokens")
        if not parts:
            return []
        enough = _at_share(self._lengths, KEPT_SHARE)
        advice = (
            f"; {enough} would keep 99 % of those that can be tokenized" if enough > self._max_tokens else ""
        )
        return [", ".join(parts) + advice]

    def _add_length(self, num_tokens: int, origin: str) -> None:
        self._lengths[num_tokens] += 1
        if num_tokens > self._longest[0]:
            self._longest = (num_tokens, origin)


def _pairs(pairs: Iterable[tuple[Origin, Origin]]) -> tuple[str, ...]:
    return tuple(f"{row} like {earlier}" for row, earlier in pairs)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _at_share(lengths: Counter[int], share: float) -> int:
    """Return the smallest length that at least ``share`` of the rows do not exceed; 0 without rows."""
    needed, seen = share * lengths.total(), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= needed:
            return length
    return 0


def _histogram(lengths: Counter[int]) -> tuple[LengthBin, ...]:
    """Return bins whose limits double, up to the longest row."""
    bins, limit, below = [], SMALLEST_BIN, 0
    while lengths and below < max(lengths):
        rows = sum(count for length, count in lengths.items() if below < length <= limit)
        bins.append(LengthBin(max_tokens=limit, rows=rows))
        below, limit = limit, limit * 2
    return tuple(bins)
