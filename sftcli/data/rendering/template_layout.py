r"""What a template makes of a shape: the fixed text between contents, where answers start, and where they stop.

A shape is rendered once with an unguessable marker in every slot. The places of the markers give the fixed text for any
template. Where generation would start is where the rendering of the turns before, with a generation prompt, ends. The
text is then cut at its control tokens and where generation would start; each segment in between is tokenized by itself,
so no token can straddle a cut, and ids and mask are born segment by segment::

    <|im_start|> | user\n{slot} | <|im_end|> | \n | <|im_start|> | assistant\n || {slot} | <|im_end|> | \n
                                                                  generation starts  ~~~~~~ trained ~~~~
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sftcli.config.schema.data import Thinking
from sftcli.data.conversations.messages import RejectReason, Role, RowFaultError
from sftcli.data.example import RowFlag
from sftcli.data.rendering.conversation_shape import ConversationShape, Slot, TurnShape, arguments_of
from sftcli.data.rendering.markers import Markers, fill, render
from sftcli.data.rendering.prompts import Asked, find_asked, find_cuts
from sftcli.data.rendering.segments import ControlFinder, Segment, cut_into_segments
from sftcli.data.rendering.tokenizer import ChatTokenizer
from sftcli.errors import DataError

PADDING = "\n\u2003\n"  # white space that no template writes
Kept = tuple[str, str]  # what is left of the padding before and behind a text


def find_kept(padded: Sequence[str | int], parts: Sequence[str | int], count: int) -> tuple[Kept, ...]:
    """Return for each of ``count`` slots what a template leaves of ``PADDING`` around it.

    Args:
        padded: A rendering whose slots were padded, as fixed strings and slot numbers.
        parts: The same without padding.
        count: Slots.
    """
    kept = dict.fromkeys(range(count), (PADDING, PADDING))
    numbers = [part for part in parts if isinstance(part, int)]
    if [part for part in padded if isinstance(part, int)] != numbers:
        return tuple(kept.values())
    gaps = list(zip(_gaps(padded), _gaps(parts), strict=True))
    for position, (gap, fixed) in enumerate(gaps):
        behind, before = _split_gap(gap, fixed, first=position == 0, last=position == len(gaps) - 1)
        if position > 0:
            kept[numbers[position - 1]] = (kept[numbers[position - 1]][0], behind)
        if position < len(numbers):
            kept[numbers[position]] = (before, PADDING)
    return tuple(kept.values())


def strip(text: str, kept: Kept) -> str:
    """Do to ``text`` what left ``kept`` of the padding."""
    before, behind = kept
    if before != PADDING:
        text = text.lstrip("\n") if before.startswith("\u2003") else text.lstrip()
    if behind != PADDING:
        text = text.rstrip("\n") if behind.endswith("\u2003") else text.rstrip()
    return text


def _gaps(parts: Sequence[str | int]) -> list[str]:
    """Return the fixed texts before, between and behind the slots, empty ones included."""
    gaps = [""]
    for part in parts:
        if isinstance(part, int):
            gaps.append("")
        else:
            gaps[-1] += part
    return gaps


def _split_gap(gap: str, fixed: str, *, first: bool, last: bool) -> tuple[str, str]:
    """Return the white space at the start and the end of ``gap`` that is not in ``fixed``."""
    choices = ("", "\u2003\n", "\n\u2003", PADDING)
    for behind in ("",) if first else choices:
        for before in ("",) if last else choices:
            if behind + fixed + before == gap:
                return behind, before
    return PADDING, PADDING


_SAMPLE = "Seven of 12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A trained turn: the text that asks for it, the text in front of its loss, its segments, and the slots inside them.

    ``lead`` is ``prompt``, and what generation would write in front of the answer where that has no loss.
    """

    turn: int
    prompt: tuple[str | int, ...]
    lead: tuple[str | int, ...]
    begin: int  # first segment
    end: int  # one behind the last segment
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLayout:
    """The text of a shape, with slot numbers where texts go, and the same cut into segments.

    ``shown`` is what the template makes of the conversation: the same but where the prompt of generation was put in front of the
    answer. ``levels`` says how often a text is written as JSON: never, inside a JSON text, inside one in another.
    """

    slots: tuple[Slot, ...]
    shown: tuple[str | int, ...]
    parts: tuple[str | int, ...]
    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    stop_appended: bool
    kept: tuple[Kept, ...]  # for each slot
    levels: tuple[int, ...]  # for each slot
    thoughts: frozenset[int]  # slots of the thinking in trained turns
    flags: frozenset[RowFlag]
    control_token_slots: frozenset[int] = frozenset()  # what stands there may write control tokens

    @property
    def is_joined(self) -> bool:
        """Whether the text is put together from a prompt and an answer."""
        return RowFlag.PROMPT_JOINED in self.flags

    def fillings(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Yield what may stand in the slots for ``texts``: first as they are, then as templates change them."""
        plain = list(texts)
        written = [_as_json(text, level) for text, level in zip(texts, self.levels, strict=True)]
        for candidate in [written] if written == plain else [written, plain]:
            yield candidate
            stripped = [strip(text, kept) for text, kept in zip(candidate, self.kept, strict=True)]
            if stripped != candidate:
                yield stripped

    def with_own_stripped(self, filled: Sequence[str]) -> list[str]:
        """Return ``filled`` without the white space around thinking that the template does not write, and this program does."""
        return [
            text.strip() if slot.is_thought and index not in self.shown else text
            for index, (slot, text) in enumerate(zip(self.slots, filled, strict=True))
        ]


def _as_json(text: str, level: int) -> str:
    for _ in range(level):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def build_layout(
    shape: ConversationShape,
    tokenizer: ChatTokenizer,
    controls: ControlFinder,
    *,
    asks: bool = False,
    thinking: Thinking = Thinking.TRAIN,
) -> TemplateLayout:
    """Render ``shape`` with markers and find out all there is to know about its rows.

    Args:
        shape: Of the rows.
        tokenizer: Gives the template.
        controls: Finds its control tokens.
        asks: Whether the text is to end in a generation prompt.
        thinking: Whether thinking has loss.

    Raises:
        RowFaultError: No row of this shape can be trained on: the template refuses it, drops or repeats a content,
            asks for an answer otherwise than it shows one, or ends one in no stop token.
    """
    for literal in shape.literals():
        if found := controls.search(literal):
            raise RowFaultError(
                RejectReason.CONTROL_TOKEN,
                f"a tool's name, key or description holds the control token {found!r}",
            )
    if unknown := [name for name in shape.variable_values() if not tokenizer.mentions(name)]:
        raise RowFaultError(RejectReason.TEMPLATE_DROPS, f"the template reads no variable {unknown[0]!r}")
    slots = shape.slots(thinking)
    markers = Markers(len(slots))
    try:
        shown = render(shape, markers.texts, tokenizer, asks=asks)
    except DataError as error:
        raise RowFaultError(RejectReason.TEMPLATE_REFUSED, error.message) from error
    check_calls(shape, markers.texts, shown)
    asked = find_asked(shape, slots, shown, markers, tokenizer)
    cuts = find_cuts(asked, slots, markers, trains_lead=thinking is Thinking.TRAIN)
    segments, stop_appended = cut_into_segments(
        markers.split_at(asked.text, cuts), slots, tokenizer, controls
    )
    spans = tuple(
        _span(cut.turn, asked, offset, segments, slots, markers)
        for offset, cut in cuts.items()
        if cut.turn is not None and not cut.is_within
    )
    if cuts:
        _check_whole(markers.split(asked.text[: min(cuts)]), segments, tokenizer, len(slots))
    shown_parts = markers.split(shown)
    thoughts = frozenset(index for index, slot in enumerate(slots) if slot.is_thought and slot.trained)
    return TemplateLayout(
        slots=slots,
        shown=tuple(shown_parts),
        parts=tuple(markers.split(asked.text)),
        segments=segments,
        spans=spans,
        stop_appended=stop_appended,
        kept=_find_kept(shape, shown_parts, markers, tokenizer, asks=asks),
        levels=_find_levels(shape, slots, shown_parts, markers, tokenizer, asks=asks),
        thoughts=thoughts,
        flags=frozenset(
            flag
            for flag, is_so in {
                RowFlag.THOUGHT_DROPPED: any(
                    slot.is_thought and markers.texts[index] not in asked.text
                    for index, slot in enumerate(slots)
                ),
                RowFlag.THINKING: thoughts,
                RowFlag.PROMPT_JOINED: asked.text != shown,
                RowFlag.TOOLS_DROPPED: shape.tools
                and _ignores_tools(shape, shown, markers, tokenizer, asks=asks),
                RowFlag.LEAD_TRAINED: any(
                    _has_lead(segments[span.begin], shape.turns[span.turn]) for span in spans
                ),
                RowFlag.STOP_APPENDED: stop_appended,
            }.items()
            if is_so
        ),
    )


def allow_control_tokens_of(layout: TemplateLayout, roles: frozenset[Role]) -> TemplateLayout:
    """Return ``layout`` with those segments free whose contents are all of ``roles``."""
    segments, free = [], set[int]()
    for segment in layout.segments:
        inside = [part for part in segment.parts if isinstance(part, int)]
        is_free = bool(inside) and roles.issuperset(layout.slots[part].role for part in inside)
        segments.append(replace(segment, is_free=is_free))
        free.update(inside if is_free else ())
    return replace(layout, segments=tuple(segments), control_token_slots=frozenset(free))


def _span(
    turn: int, asked: Asked, offset: int, segments: Sequence[Segment], slots: Sequence[Slot], markers: Markers
) -> Span:
    numbers = [index for index, segment in enumerate(segments) if segment.turn == turn]
    inside = dict.fromkeys(
        part for index in numbers for part in segments[index].parts if isinstance(part, int)
    )
    return Span(
        turn=turn,
        prompt=tuple(markers.split(asked.prompts[turn])),
        lead=tuple(markers.split(asked.text[:offset])),
        begin=numbers[0],
        end=numbers[-1] + 1,
        slots=tuple(index for index in inside if slots[index].turn == turn),
    )


def _ignores_tools(
    shape: ConversationShape, rendering: str, markers: Markers, tokenizer: ChatTokenizer, *, asks: bool
) -> bool:
    try:
        return rendering == render(replace(shape, tools=""), markers.texts, tokenizer, asks=asks)
    except DataError:
        return False


def _has_lead(segment: Segment, turn: TurnShape) -> bool:
    """Return whether a turn's first segment starts with more than white space that is not the turn's own."""
    opens = isinstance(turn.content[0], str) and bool(turn.content[0])
    is_own = opens or bool(turn.thinking_key)  # its thinking starts with a tag
    return (
        not is_own
        and isinstance(segment.parts[0], str)
        and bool(segment.parts[0].strip())
        and not turn.tool_calls
    )


def check_calls(shape: ConversationShape, texts: Sequence[str], rendering: str) -> None:
    """See that no arguments of a call were printed as Python prints a dict.

    Raises:
        RowFaultError: Some were.
    """
    if not shape.calls_tools:
        return
    for number, message in enumerate(shape.messages(texts), 1):
        for arguments in arguments_of(message):
            if isinstance(arguments, dict) and arguments and repr(arguments) in rendering:
                what = f"does not write the arguments of turn {number} as JSON"
                raise RowFaultError(RejectReason.TEMPLATE_REWRITES, f"the template {what}")


def _check_whole(
    begins: Sequence[str | int], segments: Sequence[Segment], tokenizer: ChatTokenizer, num_slots: int
) -> None:
    """See that the segments of ``begins``, all in front of the first cut, give the ids that the tokenizer gives for it as a whole."""
    samples = [_SAMPLE] * num_slots
    text = fill(begins, samples)
    (whole,) = tokenizer.encode_many([text], reading="template")
    ids: list[int] = []
    for segment in segments:
        if not text:
            break
        part = fill(segment.parts, samples)
        text = text.removeprefix(part)
        ids += (
            segment.ids
            if segment.ids is not None
            else tokenizer.encode_many([part], reading="text", continued=segment.continued)[0]
        )
    if ids != whole:
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE, "the tokenizer reads a prompt otherwise than piece by piece"
        )


def _find_levels(
    shape: ConversationShape,
    slots: Sequence[Slot],
    parts: Sequence[str | int],
    markers: Markers,
    tokenizer: ChatTokenizer,
    *,
    asks: bool,
) -> tuple[int, ...]:
    """Return for each slot how often the template writes what stands there as JSON, seen at a quotation mark behind it."""
    found = {index: 1 if slot.is_argument else 0 for index, slot in enumerate(slots)}
    try:
        quoted = markers.split(
            render(shape, [f'{marker}"' for marker in markers.texts], tokenizer, asks=asks)
        )
    except DataError:
        return tuple(found.values())  # P1 finds out
    numbers = [part for part in parts if isinstance(part, int)]
    if [part for part in quoted if isinstance(part, int)] != numbers:
        return tuple(found.values())
    for number, seen, fixed in zip(numbers, _gaps(quoted)[1:], _gaps(parts)[1:], strict=True):
        for level, mark in enumerate(('"', '\\"', '\\\\\\"')):
            if seen == mark + fixed:
                found[number] = level
    return tuple(found.values())


def _find_kept(
    shape: ConversationShape,
    parts: Sequence[str | int],
    markers: Markers,
    tokenizer: ChatTokenizer,
    *,
    asks: bool,
) -> tuple[Kept, ...]:
    padded = [f"{PADDING}{marker}{PADDING}" for marker in markers.texts]
    try:
        seen = markers.split(render(shape, padded, tokenizer, asks=asks))
    except DataError:
        seen = []  # it minds white space: then contents stand as they are, or P1 finds out
    return find_kept(seen, parts, len(markers.texts))
