"""Conversations to examples: ids and loss mask, made together and proved row by row.

The method is in ``skeleton``, the proofs in ``proofs``. A row that cannot be proved comes back as ``Rejected``; nothing
is guessed and nothing disappears.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sftcli.data.conversation import Conversation, Message, PlainText, Rejected, RejectReason
from sftcli.data.example import ChatTokenizer, Example, Reading, RowFlag, TooLong
from sftcli.data.pieces import ControlFinder, Piece, RowFaultError
from sftcli.data.proofs import prove_no_leak, prove_prompt, prove_span, text_fault
from sftcli.data.records import Origin
from sftcli.data.shape import Shape, take_apart
from sftcli.data.skeleton import Skeleton, build_skeleton, fill
from sftcli.errors import DataError

__all__ = ["ChatTokenizer", "Example", "Renderer", "RowFlag", "TooLong", "encode_prompt", "render_example"]

ROWS_PER_BATCH = 256
CHARS_PER_BATCH = 2_000_000
SKELETONS_KEPT = 2048


class Renderer:
    """Turns rows into examples.

    Args:
        tokenizer: Gives template and tokens.
        max_tokens: Rows with more tokens are rejected.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._drafter = _Drafter(tokenizer)
        forbidden = np.zeros((2, tokenizer.vocab_size), dtype=np.bool_)
        forbidden[:, list(tokenizer.control_ids)] = True
        forbidden[0, list(tokenizer.markup_ids)] = True
        self._forbidden_in_text, self._forbidden_in_answers = forbidden

    def render_all(self, rows: Iterable[Conversation | PlainText]) -> Iterator[Example | Rejected]:
        """Yield an example or a rejection for every row, in order.

        Rows are tokenized many at a time; memory does not grow with their number.
        """
        for batch in _batches(rows):
            yield from self._render_batch(batch)

    def _render_batch(self, rows: Sequence[Conversation | PlainText]) -> list[Example | Rejected]:
        results: list[Example | Rejected | None] = [None] * len(rows)
        drafts: list[tuple[int, _Draft]] = []
        for index, row in enumerate(rows):
            try:
                drafts.append((index, self._drafter.draft(row)))
            except RowFaultError as fault:
                results[index] = Rejected(origin=row.origin, reason=fault.reason, detail=fault.detail)
        self._encode([draft for _, draft in drafts])
        spans = [ids for _, draft in drafts for ids in draft.span_ids()]
        decoded = iter(self._tokenizer.decode_many(spans))
        for index, draft in drafts:
            results[index] = self._finish(draft, [next(decoded) for _ in draft.spans])
        return [result for result in results if result is not None]

    def _encode(self, drafts: Sequence["_Draft"]) -> None:
        """Give every piece of every draft its ids, with one call for all pieces that are read alike."""
        queues: dict[tuple[Reading, bool], list[tuple[_Draft, int]]] = {}
        for draft in drafts:
            for index, piece in enumerate(draft.pieces):
                if piece.ids is None:
                    queues.setdefault((draft.reading(piece), piece.continued), []).append((draft, index))
                else:
                    draft.ids[index] = piece.ids
        for (reading, continued), queue in queues.items():
            texts = [draft.piece_texts[index] for draft, index in queue]
            rows = self._tokenizer.encode_many(texts, reading=reading, continued=continued)
            for (draft, index), ids in zip(queue, rows, strict=True):
                draft.ids[index] = ids

    def _finish(self, draft: "_Draft", decoded: Sequence[str]) -> Example | Rejected:
        """Prove what was made of a row, and return it."""
        ids = np.array([token for part in draft.ids for token in part], dtype=np.int32)
        lengths = [len(part) for part in draft.ids]
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
        turns = 0 if draft.skeleton is None else len(draft.spans)
        return Example(
            input_ids=ids, loss_mask=loss_mask, origin=draft.origin, num_trained_turns=turns, flags=frozenset(flags)
        )

    def _prove_no_leak(self, draft: "_Draft", ids: "np.ndarray[tuple[int], np.dtype[np.int32]]", lengths: list[int]) -> None:
        answers = np.repeat([piece.ids is None and piece.is_answer for piece in draft.pieces], lengths)
        texts = np.repeat([piece.ids is None and not piece.is_answer for piece in draft.pieces], lengths)
        prove_no_leak(ids, answers, self._forbidden_in_answers)
        prove_no_leak(ids, texts, self._forbidden_in_text)

    def _prove_spans(self, draft: "_Draft", decoded: Sequence[str]) -> set[RowFlag]:
        flags = set(draft.flags)
        for span, text in zip(draft.spans, decoded, strict=True):
            expected, contents = span.text, span.contents
            if text != expected and text == (normal := self._tokenizer.normalize(expected)):
                expected, contents = normal, [self._tokenizer.normalize(content) for content in contents]
                flags.add(RowFlag.NORMALIZED)
            prove_span(
                draft.ids_between(span.begin, span.end),
                text,
                expected,
                contents=contents,
                stop_ids=self._tokenizer.stop_ids,
                turn=span.turn,
            )
        return flags


@dataclass(frozen=True, slots=True)
class _Span:
    """Trained pieces ``begin`` to ``end`` of a row, what they should read, and the contents that should be inside."""

    turn: int
    begin: int
    end: int
    text: str
    contents: list[str]
