import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.conversations.messages import Rejected, RejectReason
from sftcli.data.example import Example, RowFlag, TooLong
from sftcli.data.quality.audit import SupervisionAudit
from sftcli.data.quality.audit_summary import AuditSummary
from sftcli.data.quality.duplicates import Duplicates
from sftcli.data.reading.record import Origin
from sftcli.own_files import as_form


def example(
    length: int, trained: int = 1, *, line: int = 1, flags: frozenset[RowFlag] = frozenset()
) -> Example:
    return Example(
        input_ids=np.zeros(length, dtype=np.int32),
        loss_mask=np.arange(length) >= length - trained,
        origin=Origin(path="a.jsonl", line=line),
        num_trained_turns=1,
        flags=flags,
    )


def too_long(length: int, line: int = 1) -> TooLong:
    return TooLong(
        origin=Origin(path="a.jsonl", line=line),
        reason=RejectReason.TOO_LONG,
        detail=f"{length} tokens",
        num_tokens=length,
    )


def refused(line: int) -> Rejected:
    return Rejected(
        origin=Origin(path="a.jsonl", line=line),
        reason=RejectReason.TEMPLATE_REFUSED,
        detail="no system role",
    )


def summary_of(*results: Example | Rejected, max_tokens: int = 100) -> AuditSummary:
    audit = SupervisionAudit(max_tokens)
    for result in results:
        audit.add(result)
    return audit.summary()


def test_every_row_is_kept_or_rejected_for_one_reason():
    summary = summary_of(example(5), refused(2), refused(3), too_long(300))
    assert (summary.rows, summary.kept) == (4, 1)
    assert summary.rejected == {"template-refused": 2, "too-long": 1}


def test_tokens_are_those_of_kept_rows():
    summary = summary_of(example(5, 2), example(7, 3), too_long(300))
    assert (summary.tokens, summary.prompt_tokens, summary.response_tokens) == (12, 7, 5)
    assert summary.trained_turns == 2


def test_the_first_few_rows_of_each_reason_are_named():
    summary = summary_of(*(refused(line) for line in range(1, 10)))
    assert summary.rejected_rows["template-refused"][0] == "a.jsonl:1: no system role"
    assert len(summary.rejected_rows["template-refused"]) == 5


def test_the_longest_row_is_named_although_it_was_rejected():
    summary = summary_of(example(5, line=1), too_long(300, line=9))
    assert (summary.longest_tokens, summary.longest_row) == (300, "a.jsonl:9")


def test_kept_rows_without_loss_are_counted():
    assert summary_of(example(5, 0), example(5, 1)).untrained_rows == 1


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=200))
def test_the_limit_for_99_percent_is_the_smallest_that_is_enough(lengths: list[int]):
    summary = summary_of(*(too_long(n) if n > 100 else example(n) for n in lengths))
    limit = summary.max_tokens_for_99_percent
    assert sum(n <= limit for n in lengths) >= 0.99 * len(lengths)
    assert sum(n < limit for n in lengths) < 0.99 * len(lengths)


@given(lengths=st.lists(st.integers(1, 3000), max_size=100))
def test_the_histogram_holds_every_row_once(lengths: list[int]):
    bins = summary_of(*(too_long(n) if n > 100 else example(n) for n in lengths)).length_histogram
    assert sum(part.rows for part in bins) == len(lengths)
    assert [part.max_tokens for part in bins] == [32 * 2**i for i in range(len(bins))]


def test_percentiles_are_lengths_of_rows():
    summary = summary_of(*(example(n) for n in range(1, 101)))
    assert summary.length_percentiles == {"50": 50, "90": 90, "95": 95, "99": 99}


def test_an_audit_of_nothing_is_all_zero():
    summary = summary_of()
    assert (summary.rows, summary.kept, summary.tokens, summary.max_tokens_for_99_percent) == (0, 0, 0, 0)
    assert summary.length_histogram == ()
    assert summary.notes == ()


def test_rows_left_out_for_their_length_are_said_with_a_limit_that_would_keep_them():
    summary = summary_of(*(example(50) for _ in range(97)), *(too_long(n) for n in (120, 150, 700)))
    assert summary.notes == (
        "3 rows longer than 100 tokens left out; 150 would keep 99 % of those that can be tokenized",
    )


def test_what_was_noticed_is_said_in_a_sentence_each():
    summary = summary_of(example(5, flags=frozenset({RowFlag.STRIPPED, RowFlag.CONTROL_TEXT})))
    assert summary.flags == {"control-text": 1, "stripped": 1}
    assert summary.notes == (
        "in 1 row a message contains the text of a control token; it stays text",
        "in 1 row the template strips white space around messages; they are trained stripped",
    )


@pytest.mark.parametrize("flag", RowFlag)
def test_every_flag_has_a_sentence(flag: RowFlag):
    assert len(summary_of(example(5, flags=frozenset({flag}))).notes) == 1


def test_notes_of_the_caller_come_first_and_once():
    audit = SupervisionAudit(100)
    audit.note("the template prints the date")
    audit.note("the template prints the date")
    audit.add(example(5, flags=frozenset({RowFlag.STRIPPED})))
    assert audit.summary().notes[0] == "the template prints the date"
    assert len(audit.summary().notes) == 2


def test_a_summary_survives_json():
    summary = summary_of(example(5), refused(2), too_long(300))
    text = json.dumps(summary.to_json())
    assert json.dumps(as_form(json.loads(text), AuditSummary).to_json()) == text


def test_rows_are_counted_for_each_source():
    audit = SupervisionAudit(100)
    audit.add(example(5, 2), source="one")
    audit.add(refused(2), source="one")
    audit.add(example(7, 3), source="two")
    sources = audit.summary().sources
    assert dataclasses.asdict(sources["one"]) == {
        "rows": 2, "kept": 1, "rejected": 1, "cut": 0, "tokens": 5, "response_tokens": 2,
    }  # fmt: skip
    assert sources["two"].response_tokens == 3


def test_rows_that_were_cut_are_counted_with_the_length_they_had():
    cut = dataclasses.replace(example(100), num_cut=20, flags=frozenset({RowFlag.CUT_ANSWER}))
    summary = summary_of(cut, example(5))
    assert (summary.cut_rows, summary.cut_tokens, summary.tokens) == (1, 20, 105)
    assert summary.longest_tokens == 120
    assert summary.notes[-1] == "1 row cut to 100 tokens; 120 would keep 99 % of those that can be tokenized"


def test_the_first_rows_of_each_remark_are_named():
    rows = [example(5, line=line, flags=frozenset({RowFlag.MISREAD})) for line in range(1, 10)]
    assert summary_of(*rows).flagged_rows == {"misread": tuple(f"a.jsonl:{line}" for line in range(1, 6))}


def test_duplicates_are_named_in_pairs():
    audit = SupervisionAudit(100)
    pair = (Origin(path="a.jsonl", line=9), Origin(path="a.jsonl", line=3))
    audit.add_duplicates(Duplicates(exact=1, exact_examples=(pair,)))
    summary = audit.summary()
    assert (summary.duplicate_rows, summary.near_duplicate_rows) == (1, 0)
    assert summary.duplicates["exact"] == ("a.jsonl:9 like a.jsonl:3",)
