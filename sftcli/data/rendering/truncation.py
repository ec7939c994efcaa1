"""Rows that are too long: how much of them fits, in whole turns where one fits, else in tokens of an answer.

A row that loses whole turns is rendered and proved anew, as the shorter conversation that it has become. Where not even
its first answer fits, that answer loses its end: it keeps no stop token, because it does not end there. Running text becomes several
rows instead, and loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from sftcli.data.conversations.messages import Conversation
from sftcli.data.example import Example, RowFlag
from sftcli.data.rendering.draft import Draft, TrainedSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An example with the draft it was made of."""

    draft: Draft
    example: Example


def beginnings(row: Conversation, made: Made, *, max_tokens: int) -> list[Conversation]:
    """Return the conversations that ``row`` begins with and that may fit, longest first, each up to a trained turn.

    The last one is up to the first trained turn whether it fits or not. ``row`` itself is not among them.
    """
    spans = made.draft.spans
    turns = [
        span.turn for span in spans if span is spans[0] or _span_place(made.draft, span)[1] <= max_tokens
    ]
    return [
        replace(row, messages=row.messages[: turn + 1])
        for turn in reversed(turns)
        if turn + 1 < len(row.messages)
    ]


def cut_behind(made: Made, *, max_tokens: int) -> Example | None:
    """Return the example without what the template writes behind the last answer; None where that is not enough."""
    if _span_place(made.draft, made.draft.spans[-1])[1] > max_tokens:
        return None
    return cut_at(made.example, max_tokens, RowFlag.CUT_END)


def answer_that_fits(made: Made, *, max_tokens: int) -> Sequence[int]:
    """Return the tokens of the first trained turn, without its stop token, that fit; none where its prompt does not."""
    begin, end = _span_place(made.draft, made.draft.spans[0])
    return made.draft.span_ids(made.draft.spans[0])[: max(0, min(max_tokens, end - 1) - begin)]


def cut_answer(made: Made, ids: Sequence[int], flag: RowFlag) -> Example:
    """Return the example cut behind ``ids``, with which its first trained turn begins."""
    begin, _ = _span_place(made.draft, made.draft.spans[0])
    example = cut_at(made.example, begin + len(ids), flag)
    if len(made.draft.spans) == 1:
        return example
    return replace(example, num_trained_turns=1, flags=example.flags | {RowFlag.CUT_TURNS})


def cut_at(example: Example, num_tokens: int, flag: RowFlag) -> Example:
    """Return the first ``num_tokens`` tokens of an example that may have no more than them."""
    left = len(example.input_ids) - num_tokens
    if left <= 0:
        return example
    return replace(
        example,
        input_ids=example.input_ids[:num_tokens],
        loss_mask=example.loss_mask[:num_tokens],
        num_cut=example.num_cut + left,
        flags=example.flags | {flag},
    )


def cut_text(example: Example, max_tokens: int) -> list[Example]:
    """Return ``example``, a piece of running text, in pieces of at most ``max_tokens`` tokens, at least 2.

    Each piece begins with the last token of the one before, which has no loss there. So every token but the first of
    the whole is predicted exactly once, and no piece is without loss.
    """
    if len(example.input_ids) <= max_tokens:
        return [example]
    pieces = []
    for begin in range(0, len(example.input_ids) - 1, max_tokens - 1):
        loss_mask = example.loss_mask[begin : begin + max_tokens].copy()
        loss_mask[0] = False
        ids = example.input_ids[begin : begin + max_tokens]
        pieces.append(replace(example, input_ids=ids, loss_mask=loss_mask))
    return pieces


def _span_place(draft: Draft, span: TrainedSpan) -> tuple[int, int]:
    """Return the places of a span's first token and of the one behind its last."""
    ends = [0, *accumulate(len(part) for part in draft.ids)]
    return ends[span.begin], ends[span.end]
