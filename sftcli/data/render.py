"""Conversations to examples: ids and loss mask, made together and proved row by row.

The method is in ``skeleton``, the proofs in ``proofs``. A row that cannot be proved comes back as ``Rejected``; nothing
is guessed and nothing disappears.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sftcli.data.conversation import Conversation, Message, PlainText, Rejected, RejectReason
from sftcli.data.draft import Draft, Drafter
from sftcli.data.example import ChatTokenizer, Example, Reading, RowFlag, TooLong
from sftcli.data.pieces import RowFaultError
from sftcli.data.proofs import prove_no_leak, prove_span
from sftcli.errors import DataError

__all__ = ["ChatTokenizer", "Example", "Renderer", "RowFlag", "TooLong", "encode_prompt", "render_rows"]

ROWS_PER_BATCH = 256
CHARS_PER_BATCH = 2_000_000


class Renderer:
    """Turns rows into examples.

    Args:
        tokenizer: Gives template and tokens.
        max_tokens: Rows with more tokens are rejected.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._drafter = Drafter(tokenizer)
        self._forbidden_in_answers = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        self._forbidden_in_answers[list(tokenizer.control_ids)] = True
        self._forbidden = self._forbidden_in_answers.copy()
        self._forbidden[list(tokenizer.markup_ids)] = True

    def render_all(self, rows: Iterable[Conversation | PlainText]) -> Iterator[Example | Rejected]:
        """Yield an example or a rejection for every row, in order.

        Rows are tokenized many at a time, in a thread of its own: the tokenizer works on all cores without Python's
        lock, meanwhile the next rows are drafted and the last ones proved. Memory does not grow with their number.
        """
        with ThreadPoolExecutor(1) as background:
            running: Future[_Batch] | None = None
            for rows_of_batch in _batches(rows):
                following = background.submit(self._tokenize, self._draft_batch(rows_of_batch))
                if running:
                    yield from self._finish_batch(running.result())
                running = following
            if running:
                yield from self._finish_batch(running.result())

    def render_example(self, row: Conversation | PlainText) -> Example | Rejected:
        """Return the example of one row, or why there is none."""
        return next(self._finish_batch(self._tokenize(self._draft_batch([row]))))

    def _draft_batch(self, rows: Sequence[Conversation | PlainText]) -> "_Batch":
        results: list[Rejected | Draft] = []
        for row in rows:
            try:
                results.append(self._drafter.draft(row))
            except RowFaultError as fault:
                results.append(Rejected(origin=row.origin, reason=fault.reason, detail=fault.detail))
        return _Batch(results=results)

    def _tokenize(self, batch: "_Batch") -> "_Batch":
        drafts = [result for result in batch.results if isinstance(result, Draft)]
        _encode(drafts, self._tokenizer)
        spans = [draft.span_ids(span) for draft in drafts for span in draft.spans]
        return replace(batch, decoded=self._tokenizer.decode_many(spans))

    def _finish_batch(self, batch: "_Batch") -> Iterator[Example | Rejected]:
        decoded = iter(batch.decoded)
        for result in batch.results:
            if isinstance(result, Draft):
                yield self._finish(result, [next(decoded) for _ in result.spans])
            else:
                yield result

    def _finish(self, draft: Draft, decoded: Sequence[str]) -> Example | Rejected:
        """Prove what was made of a row, and return it."""
        ids = np.array([token for part in draft.ids for token in part], dtype=np.int32)
        lengths = np.array([len(part) for part in draft.ids])
        loss_mask = np.repeat([piece.turn is not None for piece in draft.pieces], lengths)
        try:
            self._prove_no_leak(draft, ids, lengths)
            flags = self._prove_spans(draft, decoded)
        except RowFaultError as fault:
            return Rejected(origin=draft.origin, reason=fault.reason, detail=fault.detail)
        if len(ids) > self._max_tokens:
            return TooLong(
                origin=draft.origin,
                reason=RejectReason.TOO_LONG,
                detail=f"{len(ids)} tokens, {self._max_tokens} are allowed",
                num_tokens=len(ids),
            )
        return Example(
            input_ids=ids,
            loss_mask=loss_mask,
            origin=draft.origin,
            kind="conversation" if draft.num_turns else "text",
            num_trained_turns=draft.num_turns,
            flags=flags,
        )

    def _prove_no_leak(
        self, draft: Draft, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]
    ) -> None:
        answers = np.repeat([piece.ids is None and piece.is_answer for piece in draft.pieces], lengths)
        others = np.repeat([piece.ids is None and not piece.is_answer for piece in draft.pieces], lengths)
        prove_no_leak(ids, answers, self._forbidden_in_answers)
        prove_no_leak(ids, others, self._forbidden)

    def _prove_spans(self, draft: Draft, decoded: Sequence[str]) -> frozenset[RowFlag]:
        flags = draft.flags
        for span, text in zip(draft.spans, decoded, strict=True):
            behind, contents = span.behind, span.contents
            if span.may_gain_space and text.startswith(" ") and not behind.startswith(text):
                text = text[1:]
            if not behind.startswith(text):
                normal = self._tokenizer.normalize(behind)
                if normal != behind and normal.startswith(text):
                    behind, contents = normal, [self._tokenizer.normalize(content) for content in contents]
                    flags |= {RowFlag.NORMALIZED}
            prove_span(
                draft.span_ids(span),
                text,
                behind,
                contents=contents,
                stop_ids=self._tokenizer.stop_ids,
                turn=span.turn,
            )
        return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Rows on their way; ``decoded`` is how the trained spans of all drafts read."""

    results: Sequence[Rejected | Draft]
    decoded: Sequence[str] = ()


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
