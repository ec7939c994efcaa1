"""Conversations to examples: ids and loss mask, made together and proved row by row.

The method is in ``skeleton``, the proofs in ``proofs``. A row that cannot be proved comes back as ``Rejected``; nothing
is guessed and nothing disappears.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sftcli.data.conversation import Conversation, Message, PlainText, Rejected, RejectReason
from sftcli.data.cutting import Made, answer_that_fits, beginnings, cut_answer, cut_behind
from sftcli.data.draft import Draft, Drafter, TrainedSpan
from sftcli.data.example import ChatTokenizer, Example, Reading, RowFlag, TooLong
from sftcli.data.pieces import RowFaultError
from sftcli.data.proofs import find_contents, prove_cut_span, prove_no_leak, prove_span
from sftcli.errors import DataError

__all__ = ["ChatTokenizer", "Example", "Renderer", "RowFlag", "TooLong", "encode_prompt", "render_rows"]

ROWS_PER_BATCH = 256
CHARS_PER_BATCH = 2_000_000
TOKENS_PER_CHARACTER = 4


class Renderer:
    """Turns rows into examples.

    Args:
        tokenizer: Gives template and tokens.
        max_tokens: Rows with more tokens are rejected.
        cuts: Whether they are cut instead, where something to train on is left.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, max_tokens: int, cuts: bool = False) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._cuts = cuts
        self._drafter = Drafter(tokenizer)
        self._forbidden_in_answers = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._forbidden_in_answers[list(tokenizer.control_ids)] = True
        self._forbidden = self._forbidden_in_answers.copy()
        self._forbidden[list(tokenizer.markup_ids)] = True

    def render_all(self, rows: Iterable[Conversation | PlainText]) -> Iterator[Example | Rejected]:
        """Yield an example or a rejection for every row, in order.

        Rows are tokenized many at a time; memory does not grow with their number.
        """
        for batch in _batches(rows):
            yield from self._render_batch(batch)

    def render_example(self, row: Conversation | PlainText) -> Example | Rejected:
        """Return the example of one row, or why there is none."""
        return self._render_batch([row])[0]

    def _render_batch(self, rows: Sequence[Conversation | PlainText]) -> list[Example | Rejected]:
        made = self._make(rows)
        return [
            self._fit(row, result) if isinstance(result, Made) else result
            for row, result in zip(rows, made, strict=True)
        ]

    def _make(self, rows: Sequence[Conversation | PlainText]) -> list[Made | Rejected]:
        results: list[Rejected | Draft] = []
        for row in rows:
            try:
                results.append(self._drafter.draft(row))
            except RowFaultError as fault:
                results.append(Rejected(origin=row.origin, reason=fault.reason, detail=fault.detail))
        drafts = [result for result in results if isinstance(result, Draft)]
        _encode(drafts, self._tokenizer)
        decoded = iter(
            self._tokenizer.decode_many([draft.span_ids(span) for draft in drafts for span in draft.spans])
        )
        return [
            self._finish(result, [next(decoded) for _ in result.spans])
            if isinstance(result, Draft)
            else result
            for result in results
        ]

    def _finish(self, draft: Draft, decoded: Sequence[str]) -> Made | Rejected:
        """Prove what was made of a row, and return it, however long it is."""
        ids = np.array([token for part in draft.ids for token in part], dtype=np.int32)
        lengths = np.array([len(part) for part in draft.ids])
        loss_mask = np.repeat([piece.turn is not None for piece in draft.pieces], lengths)
        try:
            self._prove_no_leak(draft, ids, lengths)
            flags = self._prove_spans(draft, decoded)
        except RowFaultError as fault:
            return Rejected(origin=draft.origin, reason=fault.reason, detail=fault.detail)
        example = Example(
            input_ids=ids,
            loss_mask=loss_mask,
            origin=draft.origin,
            num_trained_turns=draft.num_turns,
            flags=flags,
        )
        return Made(draft=draft, example=example)

    def _fit(self, row: Conversation | PlainText, made: Made) -> Example | Rejected:
        """Return what is made of a row as the policy for long rows has it."""
        num_tokens = len(made.example.input_ids)
        if num_tokens <= self._max_tokens:
            return made.example
        detail = f"{num_tokens} tokens, {self._max_tokens} are allowed"
        if self._cuts:
            try:
                shorter = self._cut(row, made)
            except RowFaultError as fault:
                return Rejected(origin=row.origin, reason=fault.reason, detail=fault.detail)
            if shorter is not None:
                return shorter
            detail += ", and what comes before the answer leaves no room for it"
        return TooLong(origin=row.origin, reason=RejectReason.TOO_LONG, detail=detail, num_tokens=num_tokens)

    def _cut(self, row: Conversation | PlainText, whole: Made) -> Example | None:
        """Return the beginning of a row that fits: of all that can be proved, the one with the most turns."""
        shortest = whole
        ends_trained = isinstance(row, Conversation) and whole.draft.spans[-1].turn == len(row.messages) - 1
        if ends_trained and (example := cut_behind(whole, max_tokens=self._max_tokens)):
            return example
        for beginning in beginnings(row, whole, max_tokens=self._max_tokens):
            (made,) = self._make([beginning])
            if isinstance(made, Rejected):
                continue
            lost = len(whole.example.input_ids) - len(made.example.input_ids)
            flagged = replace(made.example, num_cut=lost, flags=made.example.flags | {RowFlag.CUT_TURNS})
            shortest = Made(draft=made.draft, example=flagged)
            if example := cut_behind(shortest, max_tokens=self._max_tokens):
                return example
        return self._cut_answer(shortest)

    def _cut_answer(self, made: Made) -> Example | None:
        """Return the example with the end of its first trained turn cut off, and prove P3 for what is left."""
        span, ids = made.draft.spans[0], answer_that_fits(made, max_tokens=self._max_tokens)
        text, behind, contents, flags = self._read(span, *self._tokenizer.decode_many([ids]))
        for _ in range(TOKENS_PER_CHARACTER):
            if not behind.startswith(text):  # the last token is the beginning of a character
                ids = ids[:-1]
                text, behind, contents, flags = self._read(span, *self._tokenizer.decode_many([ids]))
        begin, end = find_contents(behind, contents)
        if not text[begin:].strip():
            return None
        prove_cut_span(
            ids, text, behind, contents=contents, stop_ids=self._tokenizer.stop_ids, turn=span.turn
        )
        flag = RowFlag.CUT_STOP if len(text) >= end else RowFlag.CUT_ANSWER
        example = cut_answer(made, ids, flag)
        return replace(example, flags=example.flags | flags)

    def _prove_no_leak(
        self, draft: Draft, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
    ) -> None:
        answers = np.repeat([piece.ids is None and piece.is_answer for piece in draft.pieces], lengths)
        others = np.repeat([piece.ids is None and not piece.is_answer for piece in draft.pieces], lengths)
        prove_no_leak(ids, answers, self._forbidden_in_answers)
        prove_no_leak(ids, others, self._forbidden)

    def _prove_spans(self, draft: Draft, decoded: Sequence[str]) -> frozenset[RowFlag]:
        flags = draft.flags
        for span, plain in zip(draft.spans, decoded, strict=True):
            text, behind, contents, noticed = self._read(span, plain)
            flags |= noticed
            prove_span(
                draft.span_ids(span),
                text,
                behind,
                contents=contents,
                stop_ids=self._tokenizer.stop_ids,
                turn=span.turn,
            )
        return flags

    def _read(self, span: TrainedSpan, text: str) -> tuple[str, str, Sequence[str], frozenset[RowFlag]]:
        """Return decoded ``text``, and what it is to be compared with: the text behind the prompt, and the contents."""
        behind, contents = span.behind, span.contents
        if span.may_gain_space and text.startswith(" ") and not behind.startswith(text):
            text = text[1:]
        if not behind.startswith(text):
            normal = self._tokenizer.normalize(behind)
            if normal != behind and normal.startswith(text):
                contents = [self._tokenizer.normalize(content) for content in contents]
                return text, normal, contents, frozenset({RowFlag.NORMALIZED})
        return text, behind, contents, frozenset()


def render_rows(
    rows: Iterable[Conversation | PlainText | Rejected], renderer: Renderer
) -> Iterator[Example | Rejected]:
    """Render what can be rendered; rows that were rejected before pass through, in order."""
    rows = list(rows)
    rendered = renderer.render_all(row for row in rows if not isinstance(row, Rejected))
    for row in rows:
        yield row if isinstance(row, Rejected) else next(rendered)


def encode_prompt(tokenizer: ChatTokenizer, messages: Sequence[Message], *, tools: str = "") -> list[int]:
    """Return the ids that ask for an answer to ``messages``, as training has them before an answer.

    Raises:
        DataError: The template refuses the messages, or their control tokens cannot be told from the template's.
    """
    try:
        draft = Drafter(tokenizer).draft_prompt(tuple(messages), tools=tools)
    except RowFaultError as fault:
        raise DataError(f"the prompt cannot be rendered: {fault.detail}") from fault
    _encode([draft], tokenizer)
    return [token for part in draft.ids for token in part]


def _encode(drafts: Sequence[Draft], tokenizer: ChatTokenizer) -> None:
    """Give every piece of every draft its ids, with one call for all pieces that are read alike."""
    queues: dict[tuple[Reading, bool], list[tuple[Draft, int]]] = {}
    for draft in drafts:
        for index, piece in enumerate(draft.pieces):
            if piece.ids is None:
                queues.setdefault((draft.reading(piece), piece.continued), []).append((draft, index))
    for (reading, continued), queue in queues.items():
        texts = [draft.piece_text(index) for draft, index in queue]
        rows = tokenizer.encode_many(texts, reading=reading, continued=continued)
        for (draft, index), ids in zip(queue, rows, strict=True):
            draft.ids[index] = ids


def _batches(rows: Iterable[Conversation | PlainText]) -> Iterator[list[Conversation | PlainText]]:
    """Yield ``rows`` in lists of limited length and size."""
    batch: list[Conversation | PlainText] = []
    size = 0
    for row in rows:
        batch.append(row)
        texts = [row.text] if isinstance(row, PlainText) else [message.content for message in row.messages]
        size += sum(map(len, texts))
        if len(batch) >= ROWS_PER_BATCH or size >= CHARS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
