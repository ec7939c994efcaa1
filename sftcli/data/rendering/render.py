"""Conversations to examples: ids and loss mask, made together and proved row by row.

The method is in ``template_layout``, the proofs in ``proofs``. A row that cannot be proved comes back as ``Rejected``; nothing
is guessed and nothing disappears.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.heldout_split import source_key
from sftcli.data.conversations.messages import (
    Conversation,
    PlainText,
    Rejected,
    RejectReason,
    Role,
    RowFaultError,
    TokenRow,
)
from sftcli.data.example import Example, RowFlag, TooLong
from sftcli.data.reading.record import Origin
from sftcli.data.rendering.advice import Adviser
from sftcli.data.rendering.draft import Draft, Drafter, TrainedSpan
from sftcli.data.rendering.encode import encode, laid_out
from sftcli.data.rendering.proofs import find_contents, has_leak, prove_cut_span, prove_no_leak, prove_span
from sftcli.data.rendering.segments import Places
from sftcli.data.rendering.stop_text import StopTexts
from sftcli.data.rendering.tokenizer import ChatTokenizer
from sftcli.data.rendering.truncation import (
    Made,
    answer_that_fits,
    beginnings,
    cut_answer,
    cut_at,
    cut_behind,
    cut_text,
)

Row = Conversation | PlainText | TokenRow | Rejected

ROWS_PER_BATCH = 256
CHARS_PER_BATCH = 2_000_000
COLLECTED_OBJECTS = 20_000  # more than a batch makes


def row_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield ``rows`` in lists of limited length and size."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += num_chars(row)
        if len(batch) >= ROWS_PER_BATCH or size >= CHARS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def num_chars(row: Row) -> int:
    """Return the characters of all contents."""
    match row:
        case Conversation():
            return sum([len(message.content) for message in row.messages])
        case PlainText():
            return len(row.text)
        case TokenRow():
            return len(row.input_ids)
        case Rejected():
            return 0


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for reference cycles so rarely that most objects of a batch are gone before it looks at them."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECTED_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


COUNTED_CHARS = (
    1_000_000  # the tokens of a longer row are not counted where it is clear that they are too many
)
TOKENS_PER_CHARACTER = 4


# Why a template may not take a row whose answers are all trained, and take each of them.
SEPARABLE = frozenset(
    (
        RejectReason.TEMPLATE_DROPS,
        RejectReason.TEMPLATE_REWRITES,
        RejectReason.SPAN_UNPROVABLE,
        RejectReason.NO_STOP_TOKEN,
    )
)


def separate_answers(row: Conversation) -> list[Conversation]:
    """Return a conversation for each trained answer of ``row``, which ends with it and trains it alone; none for a single one."""
    turns = [index for index, message in enumerate(row.messages) if message.trained]
    if len(turns) < 2:
        return []
    context = [replace(message, trained=False) if message.trained else message for message in row.messages]
    return [
        replace(
            row,
            messages=(*context[:turn], row.messages[turn]),
            num_cut=row.num_cut if turn == turns[-1] else 0,
        )
        for turn in turns
    ]


class Renderer:
    """Turns rows into examples.

    Args:
        tokenizer: Gives template and tokens.
        max_tokens: Rows with more tokens are rejected; running text becomes several.
        cuts: Whether they are cut instead, where something to train on is left.
        allow_control_tokens: Whose contents may write control tokens.
        train_on: With ``each`` a row becomes an example for each of its trained answers; so it does else where its template
            lets no other way.
        thinking: Whether there is any, and whether it has loss.
        strips_stop_text: Whether the text of a stop token at the end of an answer is taken away.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        max_tokens: int,
        cuts: bool = False,
        allow_control_tokens: frozenset[Role] = frozenset(),
        train_on: TrainOn = TrainOn.ALL,
        thinking: Thinking = Thinking.TRAIN,
        strips_stop_text: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._strips_stop_text = strips_stop_text
        self._stop_texts = StopTexts(
            text for text, token in tokenizer.control_texts.items() if token in tokenizer.stop_ids
        )
        self._max_tokens = max_tokens
        self._cuts = cuts
        self._drafter = Drafter(tokenizer, allow_control_tokens, thinking)
        self._trains_each = train_on is TrainOn.EACH
        self._allowed = allow_control_tokens
        self._trials: dict[tuple[Thinking, TrainOn], Renderer] = {}
        self._adviser = Adviser(
            self._is_kept, switches=tokenizer.switches, thinking=thinking, train_on=train_on
        )
        self._forbidden = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
        self._forbidden[list(tokenizer.markup_ids)] = Places.OTHERS
        self._forbidden[list(tokenizer.control_ids)] = Places.ANSWERS | Places.OTHERS

    def render_all(self, batches: Iterable[Sequence[Row]]) -> Iterator["RenderedRows"]:
        """Yield what became of each batch, in order; what was rejected before passes through.

        A row whose answers are trained one by one gives several examples.
        A batch is tokenized in a thread of its own: the tokenizer works on all cores without Python's lock, meanwhile the
        next rows are drafted and the last ones proved. Memory does not grow with their number.
        """
        with ThreadPoolExecutor(1) as background:
            running: Future[_Batch] | None = None
            for rows in batches:
                following = background.submit(self._tokenize, self._draft_batch(rows))
                if running:
                    yield self._finish_batch(running.result())
                running = following
            if running:
                yield self._finish_batch(running.result())

    def render_batch(self, rows: Sequence[Row]) -> "RenderedRows":
        """Return what becomes of ``rows``, in this thread."""
        return self._finish_batch(self._tokenize(self._draft_batch(rows)))

    def render_example(self, row: Conversation | PlainText | TokenRow) -> Example | Rejected:
        """Return the example of one row, the first where it gives several, or why there is none."""
        return self.render_batch([row]).results[0]

    def _draft_batch(self, rows: Sequence[Row]) -> "_Batch":
        pairs = [pair for row in rows for pair in self._drafts(row)]
        return _Batch(rows=[row for row, _ in pairs], drafts=[draft for _, draft in pairs])

    def _drafts(self, row: Row) -> list[tuple[Row, Draft | Example | Rejected]]:
        """Return ``row`` with its draft; or the rows that it becomes with theirs, one for each trained answer."""
        if isinstance(row, TokenRow):
            return [(row, self._from_tokens(row))]
        if isinstance(row, Conversation):  # the parts that it may become are found by the hash of the whole
            row = replace(row, row=row.row or source_key(row).hex())
        if self._strips_stop_text and isinstance(row, Conversation):
            stripped = self._stop_texts.strip(row)
            if stripped is not row:
                pairs = self._drafts_of(stripped)
                for _, draft in pairs:
                    if isinstance(draft, Draft):
                        draft.flags |= {RowFlag.STOP_STRIPPED}
                return pairs
        return self._drafts_of(row)

    def _drafts_of(
        self, row: Conversation | PlainText | Rejected
    ) -> list[tuple[Row, Draft | Example | Rejected]]:
        parts = separate_answers(row) if isinstance(row, Conversation) else []
        if not parts:
            return [(row, self._draft(row))]
        whole = None if self._trains_each else self._draft(row)
        if isinstance(whole, Draft) or (whole and whole.reason not in SEPARABLE):
            return [(row, whole)]
        pairs: list[tuple[Row, Draft | Example | Rejected]] = []
        for part in parts:
            draft = self._draft(part)
            if isinstance(draft, Draft):
                draft.flags |= {RowFlag.SPLIT_TURNS}
            elif whole:
                return [(row, whole)]  # not all of its answers can be trained
            pairs.append((part, draft))
        return pairs

    def _from_tokens(self, row: TokenRow) -> Example | Rejected:
        """Return the example of tokens, which is as they are."""
        size = self._tokenizer.vocab_size
        if stranger := next((token for token in row.input_ids if not 0 <= token < size), None):
            detail = f"the token {stranger} is not in the vocabulary, which has {size}"
            return Rejected(origin=row.origin, reason=RejectReason.WRONG_TYPE, detail=detail)
        example = Example(
            input_ids=np.array(row.input_ids, dtype=np.int32),
            loss_mask=np.array(row.loss_mask, dtype=np.bool_),
            origin=row.origin,
            kind="conversation" if row.num_trained_turns else "text",
            num_trained_turns=row.num_trained_turns,
        )
        if len(row.input_ids) <= self._max_tokens:
            return example
        if self._cuts and any(row.loss_mask[: self._max_tokens]):
            return cut_at(example, self._max_tokens, RowFlag.CUT_ANSWER)
        return self._too_long(row.origin, len(row.input_ids))

    def _too_long(self, origin: Origin, num_tokens: int, *, before: str = "", more: str = "") -> TooLong:
        detail = f"{before}{num_tokens} tokens, {self._max_tokens} are allowed{more}"
        return TooLong(origin=origin, reason=RejectReason.TOO_LONG, detail=detail, num_tokens=num_tokens)

    def _draft(self, row: Conversation | PlainText | Rejected) -> Draft | Rejected:
        if isinstance(row, Rejected):
            return row
        if too_long := self._too_long_to_count(row):
            return too_long
        try:
            draft = self._drafter.draft(row)
            if isinstance(row, Conversation) and any(map(self._stop_texts.ends, row.messages)):
                draft.flags |= {RowFlag.STOP_TEXT}
            return draft
        except RowFaultError as fault:
            return fault.rejected(row.origin)

    def _too_long_to_count(self, row: Conversation | PlainText) -> TooLong | None:
        """Return the rejection of a row that would take seconds to tokenize and is too long in any case."""
        size, per_token = num_chars(row), self._tokenizer.max_chars_per_token
        if (
            isinstance(row, PlainText)
            or size < COUNTED_CHARS
            or not per_token
            or self._cuts
            or size // per_token <= self._max_tokens
        ):
            return None
        return self._too_long(row.origin, size // per_token, before="at least ")

    def _is_kept(self, row: Conversation, thinking: Thinking, train_on: TrainOn) -> bool:
        """Return whether ``row`` becomes examples under other settings, however long they are."""
        trial = self._trials.get((thinking, train_on))
        if trial is None:
            trial = self._trials[thinking, train_on] = Renderer(
                self._tokenizer,
                max_tokens=sys.maxsize,
                allow_control_tokens=self._allowed,
                train_on=train_on,
                thinking=thinking,
            )
        made = list(trial._made(trial._tokenize(trial._draft_batch([row]))))
        return all(isinstance(one, Made) for one in made)

    def _tokenize(self, batch: "_Batch") -> "_Batch":
        drafts = [draft for draft in batch.drafts if isinstance(draft, Draft)]
        encode(drafts, self._tokenizer)
        spans = [draft.span_ids(span) for draft in drafts for span in draft.spans]
        ids, places = laid_out(drafts)
        return replace(
            batch,
            ids=ids,
            places=places,
            trained=(places & Places.TRAINED.value) != 0,
            leaks=has_leak(ids, places, self._forbidden),
            spans=list(zip(spans, self._tokenizer.decode_many(spans), strict=True)),
        )

    def _finish_batch(self, batch: "_Batch") -> "RenderedRows":
        rows: list[Row] = []
        results: list[Example | Rejected] = []
        for row, made in zip(batch.rows, self._made(batch), strict=True):
            if isinstance(row, PlainText) and isinstance(made, Made):
                pieces = self._pieces(row, made.example)
                rows += [piece for piece, _ in pieces]
                results += [example for _, example in pieces]
                continue
            rows.append(row)
            if isinstance(made, Made):
                assert isinstance(row, Conversation)  # the others were seen to
                results.append(self._fit(row, made))
            elif isinstance(row, Conversation) and isinstance(made, Rejected):
                results.append(self._adviser.advised(row, made))
            else:
                results.append(made)
        return RenderedRows(rows=rows, results=results)

    def _pieces(self, row: PlainText, example: Example) -> list[tuple[PlainText, Example]]:
        """Return running text in pieces that fit, each with its own text."""
        examples = cut_text(example, self._max_tokens)
        if len(examples) == 1:
            return [(row, example)]
        texts = self._tokenizer.decode_many([piece.input_ids.tolist() for piece in examples])
        return [
            (replace(row, text=text), replace(piece, flags=piece.flags | {RowFlag.SPLIT_TEXT}))
            for text, piece in zip(texts, examples, strict=True)
        ]

    def _made(self, batch: "_Batch") -> Iterator[Made | Example | Rejected]:
        spans, begin = iter(batch.spans), 0
        for row, draft in zip(batch.rows, batch.drafts, strict=True):
            if not isinstance(draft, Draft):
                yield draft
                continue
            end = begin + draft.num_tokens
            score = row.score if isinstance(row, Conversation) else None
            yield self._finish(batch, draft, slice(begin, end), [next(spans) for _ in draft.spans], score)
            begin = end

    def _finish(
        self,
        batch: "_Batch",
        draft: Draft,
        place: slice,
        spans: Sequence[tuple[Sequence[int], str]],
        score: float | None,
    ) -> Made | Rejected:
        """Prove what was made of the row at ``place`` of the tokens, and return it, however long it is."""
        try:
            if batch.leaks:  # else P4 is proved for all rows
                prove_no_leak(batch.ids[place], batch.places[place], self._forbidden)
            flags = self._prove_spans(draft, spans)
        except RowFaultError as fault:
            return fault.rejected(draft.origin)
        example = Example(
            input_ids=batch.ids[place].copy(),  # a view would keep the whole batch
            loss_mask=batch.trained[place].copy(),
            origin=draft.origin,
            kind="conversation" if draft.num_turns else "text",
            num_trained_turns=draft.num_turns,
            thinking_tokens=draft.count_thinking(),
            flags=flags,
            score=score,
        )
        return Made(draft=draft, example=example)

    def _fit(self, row: Conversation, made: Made) -> Example | Rejected:
        """Return what is made of a row as the policy for long rows has it."""
        num_tokens = len(made.example.input_ids)
        if num_tokens <= self._max_tokens:
            return made.example
        more = ""
        if self._cuts:
            try:
                shorter = self._cut(row, made)
            except RowFaultError as fault:
                return fault.rejected(row.origin)
            if shorter is not None:
                return shorter
            more = ", and what comes before the answer leaves no room for it"
        return self._too_long(row.origin, num_tokens, more=more)

    def _cut(self, row: Conversation, whole: Made) -> Example | None:
        """Return the beginning of a row that fits: of all that can be proved, the one with the most turns."""
        shortest = whole
        ends_trained = whole.draft.spans[-1].turn == len(row.messages) - 1
        if ends_trained and (example := cut_behind(whole, max_tokens=self._max_tokens)):
            return example
        for beginning in beginnings(row, whole, max_tokens=self._max_tokens):
            (made,) = self._made(self._tokenize(self._draft_batch([beginning])))
            if not isinstance(made, Made):
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
        if not example.loss_mask.any():  # what is left of the answer is context
            return None
        return replace(example, flags=example.flags | flags)

    def _prove_spans(self, draft: Draft, spans: Sequence[tuple[Sequence[int], str]]) -> frozenset[RowFlag]:
        flags = draft.flags
        for span, (ids, plain) in zip(draft.spans, spans, strict=True):
            text, behind, contents, noticed = self._read(span, plain)
            flags = flags | noticed if noticed else flags
            prove_span(
                ids, text, behind, contents=contents, stop_ids=self._tokenizer.stop_ids, turn=span.turn
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRows:
    """Rows, and an example or a rejection for each of them."""

    rows: Sequence[Row]
    results: Sequence[Example | Rejected]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Rows on their way, and all their tokens one behind the other.

    ``places`` are ``Places``, ``trained`` the loss mask, ``spans`` ids and text of the trained spans of all drafts. ``leaks`` tells that P4 does not hold for one of the rows.
    """

    rows: Sequence[Row]
    drafts: Sequence[Draft | Example | Rejected]
    ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    places: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    trained: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    leaks: bool = False
    spans: Sequence[tuple[Sequence[int], str]] = ()
