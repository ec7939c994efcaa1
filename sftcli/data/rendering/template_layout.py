r"""What a template makes of a shape: the fixed text between contents, where answers start, and where they stop.

A shape is rendered once with an unguessable marker in every slot. The places of the markers give the fixed text for any
template. Where generation would start is where the rendering of the turns before, with a generation prompt, ends. The
text is then cut at its control tokens and where generation would start; each segment in between is tokenized by itself,
so no token can straddle a cut, and ids and mask are born segment by segment::

    <|im_start|> | user\n{slot} | <|im_end|> | \n | <|im_start|> | assistant\n || {slot} | <|im_end|> | \n
                                                                  generation starts  ~~~~~~ trained ~~~~
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sftcli.data.conversations.messages import RejectReason, Role, RowFaultError
from sftcli.data.example import RowFlag
from sftcli.data.rendering.conversation_shape import ConversationShape, Slot, TurnShape, arguments_of
from sftcli.data.rendering.segments import (
    CONTEXT_CHARS,
    ControlFinder,
    Cut,
    Segment,
    cut_into_segments,
    first_difference,
)
from sftcli.data.rendering.tokenizer import ChatTokenizer
from sftcli.errors import DataError

_DIGITS = "".join(chr(0xF0100 + digit) for digit in range(10))
_END = "\U000f0110"


class Markers:
    """One text for each slot that no template and no row can hold by chance."""

    def __init__(self, count: int) -> None:
        nonce = "".join(chr(0xF1000 + secrets.randbelow(0x8000)) for _ in range(8))
        self.texts = [nonce + "".join(_DIGITS[int(d)] for d in str(index)) + _END for index in range(count)]
        self._pattern = re.compile(f"{nonce}([{_DIGITS}]+){_END}")

    def split(self, text: str) -> list[str | int]:
        """Return ``text`` as fixed strings, none empty, and slot numbers."""
        parts: list[str | int] = []
        for index, segment in enumerate(self._pattern.split(text)):
            if index % 2:
                parts.append(int("".join(str(_DIGITS.index(digit)) for digit in segment)))
            elif segment:
                parts.append(segment)
        return parts

    def split_at(self, text: str, cuts: Mapping[int, int]) -> list[str | int | Cut]:
        """Return the same with cuts, given as offset in ``text`` -> turn, at their places."""
        parts: list[str | int | Cut] = []
        begin = 0
        for offset, turn in sorted(cuts.items()):
            parts += [*self.split(text[begin:offset]), Cut(turn)]
            begin = offset
        return parts + self.split(text[begin:])


PADDING = "\n \n"
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
        text = text.lstrip("\n") if before.startswith(" ") else text.lstrip()
    if behind != PADDING:
        text = text.rstrip("\n") if behind.endswith(" ") else text.rstrip()
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
    choices = ("", " \n", "\n ", "\n", PADDING)
    for behind in ("",) if first else choices:
        for before in ("",) if last else choices:
            if behind + fixed + before == gap:
                return behind, before
    return PADDING, PADDING


_SAMPLE = "Seven of 12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A trained turn: the text that asks for it, its segments, and the slots inside them."""

    turn: int
    prompt: tuple[str | int, ...]
    begin: int  # first segment
    end: int  # one behind the last segment
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLayout:
    """The text of a shape, with slot numbers where texts go, and the same cut into segments."""

    slots: tuple[Slot, ...]
    parts: tuple[str | int, ...]
    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    stop_appended: bool
    kept: tuple[Kept, ...]  # for each slot
    flags: frozenset[RowFlag]
    control_token_slots: frozenset[int] = frozenset()  # what stands there may write control tokens

    def fillings(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Yield what may stand in the slots for ``texts``: first as they are, then as templates change them."""
        plain = list(texts)
        written = [
            json.dumps(text, ensure_ascii=False)[1:-1] if slot.is_argument else text
            for slot, text in zip(self.slots, texts, strict=True)
        ]
        for candidate in [written] if written == plain else [written, plain]:
            yield candidate
            stripped = [strip(text, kept) for text, kept in zip(candidate, self.kept, strict=True)]
            if stripped != candidate:
                yield stripped


def fill(parts: Sequence[str | int], texts: Sequence[str]) -> str:
    """Return ``parts`` with a text for every number."""
    return "".join([texts[part] if isinstance(part, int) else part for part in parts])


def build_layout(
    shape: ConversationShape, tokenizer: ChatTokenizer, controls: ControlFinder, *, asks: bool = False
) -> TemplateLayout:
    """Render ``shape`` with markers and find out all there is to know about its rows.

    Args:
        shape: Of the rows.
        tokenizer: Gives the template.
        controls: Finds its control tokens.
        asks: Whether the text is to end in a generation prompt.

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
    slots = shape.slots()
    markers = Markers(len(slots))
    try:
        rendering = render(shape, markers.texts, tokenizer, asks=asks)
    except DataError as error:
        raise RowFaultError(RejectReason.TEMPLATE_REFUSED, error.message) from error
    check_calls(shape, markers.texts, rendering)
    parts = markers.split(rendering)
    _check_places(parts, slots)
    prompts = _find_prompts(shape, slots, rendering, markers, tokenizer)
    cuts = {len(prompt): turn for turn, prompt in prompts.items()}
    segments, stop_appended = cut_into_segments(markers.split_at(rendering, cuts), slots, tokenizer, controls)
    spans = tuple(
        _span(turn, tuple(markers.split(prompt)), segments, slots) for turn, prompt in prompts.items()
    )
    if spans:
        _check_whole(spans[0], segments, slots, tokenizer)
    return TemplateLayout(
        slots=slots,
        parts=tuple(parts),
        segments=segments,
        spans=spans,
        stop_appended=stop_appended,
        kept=_find_kept(shape, parts, markers, tokenizer, asks=asks),
        flags=frozenset(
            flag
            for flag, is_so in {
                RowFlag.THOUGHT_DROPPED: len({part for part in parts if isinstance(part, int)}) < len(slots),
                RowFlag.TOOLS_DROPPED: shape.tools
                and _ignores_tools(shape, rendering, markers, tokenizer, asks=asks),
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


def render(
    shape: ConversationShape,
    texts: Sequence[str],
    tokenizer: ChatTokenizer,
    *,
    num_turns: int | None = None,
    asks: bool,
) -> str:
    """Return what the template makes of the first ``num_turns`` turns (all by default) with ``texts`` in the slots.

    Raises:
        DataError: The template refuses them; the message is the template's.
    """
    messages = shape.messages(texts)[:num_turns]
    return tokenizer.render(messages, tools=shape.tool_list(), add_generation_prompt=asks)


def _span(
    turn: int, prompt: tuple[str | int, ...], segments: Sequence[Segment], slots: Sequence[Slot]
) -> Span:
    numbers = [index for index, segment in enumerate(segments) if segment.turn == turn]
    return Span(
        turn=turn,
        prompt=prompt,
        begin=numbers[0],
        end=numbers[-1] + 1,
        slots=tuple(index for index, slot in enumerate(slots) if slot.turn == turn),
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
    is_own = bool(turn.content[0])  # its thinking starts with a tag
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


def _check_places(parts: Sequence[str | int], slots: Sequence[Slot]) -> None:
    """See that every text has its place, and trained ones only one."""
    places = [part for part in parts if isinstance(part, int)]
    for index, slot in enumerate(slots):
        count = places.count(index)
        if count == 0 and (slot.trained or not slot.is_thought):
            what = "thinking" if slot.is_thought else "tool call" if slot.is_argument else "content"
            raise RowFaultError(
                RejectReason.TEMPLATE_DROPS,
                f"the template drops the {what} of turn {slot.turn + 1} ({slot.role})",
            )
        if count > 1 and slot.trained:
            raise RowFaultError(
                RejectReason.TEMPLATE_REWRITES, f"the template writes turn {slot.turn + 1} {count} times"
            )


def _find_prompts(
    shape: ConversationShape,
    slots: Sequence[Slot],
    rendering: str,
    markers: Markers,
    tokenizer: ChatTokenizer,
) -> dict[int, str]:
    """Return for each trained turn the text that asks for it, which the rendering starts with."""
    ends = _slot_ends(markers.split(rendering), markers)
    prompts = {}
    for number, turn in enumerate(shape.turns):
        if not turn.trained:
            continue
        if not any(slot.turn == number for slot in slots):
            raise RowFaultError(RejectReason.EMPTY_ANSWER, f"turn {number + 1} is empty")
        try:
            prompt = render(shape, markers.texts, tokenizer, num_turns=number, asks=True)
        except DataError as error:
            detail = f"the template refuses to ask for turn {number + 1}: {error.message}"
            raise RowFaultError(RejectReason.SPAN_UNPROVABLE, detail) from error
        if not rendering.startswith(prompt):
            raise RowFaultError(
                RejectReason.SPAN_UNPROVABLE, _prompt_differs(number, prompt, rendering, markers)
            )
        if any((end <= len(prompt)) != (slots[slot].turn < number) for slot, end in ends):
            detail = f"the template moves contents across the start of turn {number + 1}"
            raise RowFaultError(RejectReason.SPAN_UNPROVABLE, detail)
        prompts[number] = prompt
    return prompts


def _slot_ends(parts: Sequence[str | int], markers: Markers) -> list[tuple[int, int]]:
    """Return each slot number in ``parts`` with the offset of its end."""
    ends, offset = [], 0
    for part in parts:
        offset += len(markers.texts[part] if isinstance(part, int) else part)
        if isinstance(part, int):
            ends.append((part, offset))
    return ends


def _prompt_differs(number: int, prompt: str, rendering: str, markers: Markers) -> str:
    asked, shown = (fill(markers.split(text), ["..."] * len(markers.texts)) for text in (prompt, rendering))
    start = max(0, first_difference(asked, shown) - CONTEXT_CHARS // 2)
    asked, shown = asked[start : start + CONTEXT_CHARS], shown[start : start + CONTEXT_CHARS]
    return f"generation is asked for turn {number + 1} by {asked!r}, but the conversation shows {shown!r}"


def _check_whole(
    span: Span, segments: Sequence[Segment], slots: Sequence[Slot], tokenizer: ChatTokenizer
) -> None:
    """See that the segments of the first prompt give the ids that the tokenizer gives for it as a whole."""
    samples = [_SAMPLE] * len(slots)
    (whole,) = tokenizer.encode_many([fill(span.prompt, samples)], reading="template")
    ids: list[int] = []
    for segment in segments[: span.begin]:
        if segment.ids is None:
            text = fill(segment.parts, samples)
            ids += tokenizer.encode_many([text], reading="text", continued=segment.continued)[0]
        else:
            ids += segment.ids
    if ids != whole:
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE, "the tokenizer reads a prompt otherwise than segment by segment"
        )


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
