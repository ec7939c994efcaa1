"""A row on its way to tokens: its text is proved (P1, P2) and cut into segments, which wait for their ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from sftcli.config.schema.data import Thinking
from sftcli.data.conversations.messages import (
    Conversation,
    Message,
    PlainText,
    RejectReason,
    Role,
    RowFaultError,
)
from sftcli.data.conversations.remedies import SURROGATE
from sftcli.data.example import RowFlag
from sftcli.data.quality.encoding import find_trouble
from sftcli.data.reading.record import Origin
from sftcli.data.rendering.conversation_shape import (
    THINKING_KEYS,
    CallForm,
    ConversationShape,
    Form,
    find_thinking,
    take_apart,
)
from sftcli.data.rendering.markers import fill, render
from sftcli.data.rendering.proofs import prove_prompt, text_fault
from sftcli.data.rendering.segments import ControlFinder, Segment
from sftcli.data.rendering.template_layout import (
    Span,
    TemplateLayout,
    allow_control_tokens_of,
    build_layout,
    check_calls,
)
from sftcli.data.rendering.tokenizer import ChatTokenizer, Reading
from sftcli.errors import DataError

LAYOUTS_KEPT = 4096
NOWHERE = Origin(path="", line=0)
# What is wrong with a form in which a template does not want a row, in the order in which it is found.
_EARLY = (RejectReason.TEMPLATE_REFUSED, RejectReason.TEMPLATE_DROPS, RejectReason.TEMPLATE_REWRITES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSpan:
    """Pieces ``begin`` to ``end`` are trained.

    ``behind`` is the row's text from where generation would start; the tokenizer may put a space in front of it.
    """

    turn: int
    begin: int
    end: int
    behind: str
    contents: Sequence[str]
    may_gain_space: bool


@dataclass(slots=True, kw_only=True)
class Draft:
    """A row as segments. ``ids`` has an entry for each; those of segments with contents are filled in later."""

    origin: Origin
    segments: Sequence[Segment]
    texts: Sequence[str]
    spans: Sequence[TrainedSpan]
    num_turns: int
    thoughts: frozenset[int]  # slots of thinking
    has_markup: bool  # in a content
    flags: frozenset[RowFlag]
    ids: list[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments, once they are there."""
        return sum(map(len, self.ids))

    def reading(self, segment: Segment) -> Reading:
        """Return how the text of ``segment`` is to be tokenized."""
        if segment.is_free:
            return "template"
        return "text" if self.has_markup and not segment.is_answer else "answer"

    def segment_text(self, index: int) -> str:
        """Return the text of a segment."""
        return fill(self.segments[index].parts, self.texts)

    def count_thinking(self) -> int:
        """Return how many tokens with loss are thinking: by its share of the characters where a token may be of both."""
        if not self.thoughts:
            return 0
        count = 0.0
        for segment, ids in zip(self.segments, self.ids, strict=True):
            slots = [part for part in segment.parts if isinstance(part, int)]
            if segment.is_trained and not self.thoughts.isdisjoint(slots):
                sizes = {slot: len(self.texts[slot]) for slot in slots}
                own = sum(size for slot, size in sizes.items() if slot in self.thoughts)
                count += len(ids) * own / max(1, sum(sizes.values()))
        return round(count)

    def span_ids(self, span: TrainedSpan) -> list[int]:
        """Return the ids of a span."""
        return [token for part in self.ids[span.begin : span.end] for token in part]


class Drafter:
    """Makes drafts, and keeps what it learned about shapes for the next rows."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        allow_control_tokens: frozenset[Role] = frozenset(),
        thinking: Thinking = Thinking.TRAIN,
    ) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._free_roles = allow_control_tokens
        self._controls = ControlFinder(tokenizer.control_texts)
        self._thinks = tokenizer.mentions("</think>")
        self._thinking_keys = tuple(key for key in THINKING_KEYS if _reads(tokenizer, key))
        self._layouts: dict[tuple[ConversationShape, bool], TemplateLayout | RowFaultError] = {}

    def draft(self, row: Conversation | PlainText) -> Draft:
        """Return ``row`` as text that the template agrees with, in segments.

        Raises:
            RowFaultError: The row cannot be trained on.
        """
        if isinstance(row, PlainText):
            return self._draft_text(row)
        return _first_accepted(self._forms(row), lambda form: self._draft_conversation(row, form))

    def _draft_conversation(self, row: Conversation, form: Form) -> Draft:
        shape, texts = take_apart(row, thinks=self._thinks, form=form, thinking=self._thinking)
        layout = self._layout(shape, asks=False)

        def ask(turn: int) -> str:
            return self._render(shape, texts, num_turns=turn, asks=True)

        rendered = self._rendered(shape, texts, asks=False)
        filled = _agreeing(layout, texts, rendered)
        if layout.is_joined:
            filled = layout.with_own_stripped(filled)
            rendered = fill(layout.parts, filled)
        spans = [self._prove_prompt(ask, filled, rendered, layout, span) for span in layout.spans]
        draft = self._finish(row.origin, layout, texts, filled, spans)
        for span in spans if self._thinking is Thinking.TRAIN else ():
            draft.flags |= _respaced(row.messages[span.turn].content, span.behind)
        if row.num_cut:
            draft.flags |= {RowFlag.TRAILING_TURNS}
        is_written = not form.thinking_key and not self._thinks and self._thinking is not Thinking.DROP
        if is_written and any(message.thinking for message in row.messages):
            draft.flags |= {RowFlag.THOUGHT_WRITTEN}
        return draft

    def draft_prompt(self, messages: tuple[Message, ...], *, tools: str, variables: str = "") -> Draft:
        """Return ``messages`` followed by a generation prompt.

        Raises:
            RowFaultError: The template refuses them, or rewrites them while they hold control texts.
        """
        asked = tuple(replace(message, trained=False) for message in messages)
        row = Conversation(messages=asked, origin=NOWHERE, tools=tools, variables=variables)
        forms = self._forms(row)
        try:
            return _first_accepted(forms, lambda form: self._draft_asking(row, form))
        except RowFaultError as fault:
            if self._holds_controls(row):
                raise
            why = fault
        # The template writes history in its own way; without control texts its rendering can be read as it is.
        try:
            return _first_accepted(forms, lambda form: self._draft_as_is(row, form))
        except RowFaultError:
            raise why from None

    def _draft_asking(self, row: Conversation, form: Form) -> Draft:
        shape, texts = take_apart(row, thinks=self._thinks, form=form, thinking=self._thinking)
        rendered = self._rendered(shape, texts, asks=True)
        layout = self._layout(shape, asks=True)
        filled = _agreeing(layout, texts, rendered)
        return self._finish(NOWHERE, layout, texts, filled, [])

    def _draft_as_is(self, row: Conversation, form: Form) -> Draft:
        shape, texts = take_apart(row, thinks=self._thinks, form=form, thinking=self._thinking)
        rendered = self._rendered(shape, texts, asks=True)
        check_calls(shape, texts, rendered)
        (ids,) = self._tokenizer.encode_many([rendered], reading="template")
        segment = Segment(parts=(rendered,), ids=tuple(ids), turn=None)
        return _draft(NOWHERE, [segment], [], [], has_markup=False, flags=frozenset())

    def _holds_controls(self, row: Conversation) -> bool:
        shape, texts = take_apart(row, thinks=self._thinks, form=Form())
        return any(self._controls.search(text) for text in (*texts, *shape.literals()))

    def _draft_text(self, row: PlainText) -> Draft:
        if not row.text.strip():
            raise RowFaultError(RejectReason.EMPTY_TEXT, "the text is empty")
        _check_encodable(row.text)
        stop = self._tokenizer.eos_text
        prefix, ending = self._tokenizer.encode_many([self._tokenizer.text_prefix, stop], reading="template")
        segments = [
            Segment(parts=(), ids=tuple(prefix), turn=None),
            Segment(
                parts=(0,),
                ids=None,
                turn=0,
                continued=bool(prefix) and self._tokenizer.prefix_space == "first",
            ),
            Segment(parts=(), ids=tuple(ending), turn=0),
        ]
        span = TrainedSpan(
            turn=0,
            begin=1,
            end=3,
            behind=row.text + stop,
            contents=[row.text],
            may_gain_space=self._may_gain_space(segments[1]),
        )
        found = self._controls.ids_in(row.text)
        flags = frozenset({RowFlag.CONTROL_TEXT} if found else ()) | find_trouble([row.text])
        draft = _draft(row.origin, segments, [row.text], [span], has_markup=bool(found), flags=flags)
        draft.num_turns = 0
        return draft

    def _layout(self, shape: ConversationShape, *, asks: bool) -> TemplateLayout:
        known = self._layouts.get((shape, asks))
        if known is None:
            try:
                known = build_layout(
                    shape, self._tokenizer, self._controls, asks=asks, thinking=self._thinking
                )
                if self._free_roles:
                    known = allow_control_tokens_of(known, self._free_roles)
            except RowFaultError as fault:
                known = fault
            if len(self._layouts) >= LAYOUTS_KEPT:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[shape, asks] = known
        if isinstance(known, RowFaultError):
            raise RowFaultError(known.reason, known.detail, remedy=known.remedy)
        return known

    def _forms(self, row: Conversation) -> Sequence[Form]:
        """Return the forms in which ``row`` may be handed to the template, the likeliest first."""
        calls = tuple(CallForm) if any(message.tool_calls for message in row.messages) else (CallForm.OBJECT,)
        keys: tuple[str, ...] = ("",)
        if self._thinking is not Thinking.DROP and self._thinking_keys:
            if any(message.thinking for message in row.messages):
                keys = (*self._thinking_keys, "") if self._thinks else self._thinking_keys
            elif any(find_thinking(message, thinks=self._thinks) for message in row.messages):
                keys = ("", *self._thinking_keys) if self._thinks else self._thinking_keys
        return tuple(Form(call, key) for key, call in product(keys, calls))

    def _render(
        self, shape: ConversationShape, texts: Sequence[str], *, num_turns: int | None = None, asks: bool
    ) -> str:
        return render(shape, texts, self._tokenizer, num_turns=num_turns, asks=asks)

    def _rendered(self, shape: ConversationShape, texts: Sequence[str], *, asks: bool) -> str:
        try:
            rendered = self._render(shape, texts, asks=asks)
        except DataError as error:
            raise RowFaultError(RejectReason.TEMPLATE_REFUSED, error.message) from error
        _check_encodable(rendered)
        return rendered

    def _prove_prompt(
        self,
        ask: Callable[[int], str],
        filled: Sequence[str],
        rendered: str,
        layout: TemplateLayout,
        span: Span,
    ) -> TrainedSpan:
        """Prove P2 for one turn: by the real ``ask`` for the first and the last, by the shape in between."""
        prompt = fill(span.prompt, filled)
        if span in (layout.spans[0], layout.spans[-1]):
            try:
                prompt = ask(span.turn)
            except DataError as error:
                raise RowFaultError(RejectReason.SPAN_UNPROVABLE, error.message) from error
        prove_prompt(prompt, rendered, turn=span.turn)
        behind = rendered[len(prompt) if span.lead == span.prompt else len(fill(span.lead, filled)) :]
        if layout.stop_appended and span is layout.spans[-1]:
            behind += self._tokenizer.eos_text
        contents = [filled[slot] for slot in span.slots]
        said = [filled[slot] for slot in span.slots if not layout.slots[slot].is_thought]
        if not any(text.strip() for text in said):
            what = "holds nothing but thinking" if any(map(str.strip, contents)) else "is empty"
            raise RowFaultError(RejectReason.EMPTY_ANSWER, f"turn {span.turn + 1} {what}")
        return TrainedSpan(
            turn=span.turn,
            begin=span.begin,
            end=span.end,
            behind=behind,
            contents=contents,
            may_gain_space=self._may_gain_space(layout.segments[span.begin]),
        )

    def _may_gain_space(self, segment: Segment) -> bool:
        return self._tokenizer.prefix_space != "never" and not segment.continued

    def _finish(
        self,
        origin: Origin,
        layout: TemplateLayout,
        texts: Sequence[str],
        filled: Sequence[str],
        spans: Sequence[TrainedSpan],
    ) -> Draft:
        flags, markup = set[RowFlag](), False
        for number, (slot, text) in enumerate(zip(layout.slots, filled, strict=True)):
            if number in layout.control_token_slots:
                flags |= {RowFlag.CONTROL_WRITTEN} if self._controls.search(text) else set()
            elif found := self._controls.ids_in(text):
                markup = markup or not found.isdisjoint(self._tokenizer.markup_ids)
                if slot.role != "assistant" or not found.isdisjoint(self._tokenizer.control_ids):
                    flags.add(RowFlag.CONTROL_TEXT)
        if filled != texts and any(len(new) < len(old) for new, old in zip(filled, texts, strict=True)):
            flags.add(RowFlag.STRIPPED)
        flags |= layout.flags | find_trouble(texts)
        draft = _draft(origin, layout.segments, filled, spans, has_markup=markup, flags=frozenset(flags))
        draft.thoughts = layout.thoughts
        return draft


def _draft(
    origin: Origin,
    segments: Sequence[Segment],
    texts: Sequence[str],
    spans: Sequence[TrainedSpan],
    *,
    has_markup: bool,
    flags: frozenset[RowFlag],
) -> Draft:
    return Draft(
        origin=origin,
        segments=segments,
        texts=texts,
        spans=spans,
        num_turns=len(spans),
        thoughts=frozenset(),
        has_markup=has_markup,
        flags=flags,
        ids=[segment.ids or () for segment in segments],
    )


def _reads(tokenizer: ChatTokenizer, key: str) -> bool:
    """Return whether the template looks for a message's ``key``."""
    return any(tokenizer.mentions(text) for text in (f".{key}", f"'{key}'", f'"{key}"'))


def _first_accepted(forms: Sequence[Form], draft: Callable[[Form], Draft]) -> Draft:
    """Return the draft in the first of ``forms`` that holds; where none does, say what is wrong with the one that came furthest."""
    faults = []
    for form in forms:
        try:
            return draft(form)
        except RowFaultError as fault:
            faults.append(fault)
    raise max(faults, key=lambda fault: _EARLY.index(fault.reason) if fault.reason in _EARLY else len(_EARLY))


def _respaced(content: str, text: str) -> frozenset[RowFlag]:
    """Return how the white space of an answer that thinks differs in its ``text``: where it is part of the shape, P1 allows it."""
    if "</think>" not in content or content in text:
        return frozenset()
    return frozenset({RowFlag.STRIPPED if content.strip() in text else RowFlag.THOUGHT_SPACED})


def _agreeing(layout: TemplateLayout, texts: Sequence[str], rendered: str) -> Sequence[str]:
    """Prove P1: return what stands in the slots so that the text is the real rendering."""
    for filled in layout.fillings(texts):
        if fill(layout.shown, filled) == rendered:
            return filled
    raise text_fault(rendered, fill(layout.shown, texts))


def _check_encodable(text: str) -> None:
    """See that ``text`` is Unicode text, which JSON can break with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start : error.start + 1]
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE,
            f"the text holds the lone surrogate {broken!a}",
            remedy=SURROGATE,
        ) from error
