"""What a template makes of a shape: the fixed text between contents, where answers start, and where they stop.

A shape is rendered once with an unguessable marker in every slot. The places of the markers give the fixed text for any
template. Where generation would start is where the rendering of the turns before, with a generation prompt, ends. The
text is then cut at its control tokens and where generation would start; each piece in between is tokenized by itself,
so no token can straddle a cut, and ids and mask are born piece by piece::

    <|im_start|> | user\\n{slot} | <|im_end|> | \\n | <|im_start|> | assistant\\n || {slot} | <|im_end|> | \\n
                                                                  generation starts  ~~~~~~ trained ~~~~
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sftcli.data.conversation import RejectReason
from sftcli.data.example import ChatTokenizer
from sftcli.data.pieces import ControlFinder, Cut, Piece, RowFaultError, cut_into_pieces
from sftcli.data.shape import Shape, Slot
from sftcli.errors import DataError

_DIGITS = "".join(chr(0xF0100 + digit) for digit in range(10))
_END = "\U000f0110"
_PADDING = "\n \n"  # around a marker, to see what a template strips
_SAMPLE = "Seven of 12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The text of a shape, with slot numbers where texts go, and the same cut into pieces."""

    slots: tuple[Slot, ...]
    parts: tuple[str | int, ...]
    pieces: tuple[Piece, ...]
    prompts: tuple[tuple[int, tuple[str | int, ...]], ...]  # trained turn -> text that asks for it
    stop_appended: bool
    paddings: tuple[tuple[str, str], ...]  # for each slot what is left of white space before and behind it
    drops_thought: bool

    def text(self, texts: Sequence[str]) -> str:
        """Return the whole text with ``texts`` in the slots."""
        return fill(self.parts, texts)

    def fillings(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Yield what may stand in the slots for ``texts``: first as they are, then as templates change them."""
        plain = list(texts)
        written = [
            json.dumps(text, ensure_ascii=False)[1:-1] if slot.is_argument else text
            for slot, text in zip(self.slots, texts, strict=True)
        ]
        for candidate in [written] if written == plain else [written, plain]:
            yield candidate
            stripped = [_strip(text, *kept) for text, kept in zip(candidate, self.paddings, strict=True)]
            if stripped != candidate:
                yield stripped


def fill(parts: Sequence[str | int], texts: Sequence[str]) -> str:
    """Return ``parts`` with a text for every number."""
    return "".join([texts[part] if isinstance(part, int) else part for part in parts])


def build_skeleton(shape: Shape, tokenizer: ChatTokenizer, controls: ControlFinder) -> Skeleton:
    """Render ``shape`` with markers and find out all there is to know about its rows.

    Raises:
        RowFaultError: No row of this shape can be trained on: the template refuses it, drops or repeats a content,
            asks for an answer otherwise than it shows one, or ends one in no stop token.
    """
    for literal in shape.literals():
        if found := controls.search(literal):
            raise RowFaultError(
                RejectReason.CONTROL_TOKEN, f"a tool's name, key or description holds the control token {found!r}"
            )
    slots = shape.slots()
    markers = _Markers(len(slots))
    rendering = _render(tokenizer, shape, markers.texts, len(shape.turns), RejectReason.TEMPLATE_REFUSED)
    parts = markers.split(rendering)
    _check_places(parts, slots)
    cuts, prompts = _find_cuts(shape, slots, parts, rendering, markers, tokenizer)
    pieces, stop_appended = cut_into_pieces(markers.split_at(rendering, cuts), slots, tokenizer, controls)
    _check_whole(prompts, pieces, slots, tokenizer)
    seen = {part for part in parts if isinstance(part, int)}
    return Skeleton(
        slots=slots,
        parts=tuple(parts),
        pieces=pieces,
        prompts=tuple(prompts),
        stop_appended=stop_appended,
        paddings=_find_paddings(shape, parts, markers, tokenizer),
        drops_thought=len(seen) < len(slots),
    )


class _Markers:
    """One text for each slot that no template and no row can hold by chance."""

    def __init__(self, count: int) -> None:
        nonce = "".join(chr(0xF1000 + secrets.randbelow(0x8000)) for _ in range(8))
        self.texts = [nonce + "".join(_DIGITS[int(d)] for d in str(index)) + _END for index in range(count)]
        self._pattern = re.compile(f"{nonce}([{_DIGITS}]+){_END}")

    def split(self, text: str) -> list[str | int]:
        """Return ``text`` as fixed strings, none empty, and slot numbers."""
        parts: list[str | int] = []
        for index, piece in enumerate(self._pattern.split(text)):
            if index % 2:
                parts.append(int("".join(str(_DIGITS.index(digit)) for digit in piece)))
            elif piece:
                parts.append(piece)
        return parts

    def split_at(self, text: str, cuts: Mapping[int, int]) -> list[str | int | Cut]:
        """Return the same with cuts, given as offset in ``text`` -> turn, at their places."""
        parts: list[str | int | Cut] = []
        begin = 0
        for offset, turn in sorted(cuts.items()):
            parts += [*self.split(text[begin:offset]), Cut(turn)]
            begin = offset
        return parts + self.split(text[begin:])


def _render(
    tokenizer: ChatTokenizer, shape: Shape, texts: Sequence[str], num_turns: int, reason: RejectReason
) -> str:
    """Render the first ``num_turns`` turns; fewer than all are a prompt."""
    prompt = num_turns < len(shape.turns)
    try:
        return tokenizer.render(
            shape.messages(texts)[:num_turns], tools=shape.tool_list(), add_generation_prompt=prompt
        )
    except DataError as error:
        what = f"the prompt of turn {num_turns + 1}" if prompt else "the conversation"
        raise RowFaultError(reason, f"the template refuses {what}: {error.message}") from error


def _check_places(parts: Sequence[str | int], slots: Sequence[Slot]) -> None:
    """See that every text has its place, and trained ones only one."""
    places = [part for part in parts if isinstance(part, int)]
    for index, slot in enumerate(slots):
        count = places.count(index)
        if count == 0 and (slot.trained or not slot.is_thought):
            what = "thinking" if slot.is_thought else "tool call" if slot.is_argument else "content"
            raise RowFaultError(
                RejectReason.TEMPLATE_DROPS, f"the template drops the {what} of turn {slot.turn + 1} ({slot.role})"
            )
        if count > 1 and slot.trained:
            raise RowFaultError(
                RejectReason.TEMPLATE_REWRITES, f"the template writes turn {slot.turn + 1} {count} times"
            )


def _find_cuts(
    shape: Shape,
    slots: Sequence[Slot],
    parts: Sequence[str | int],
    rendering: str,
    markers: _Markers,
    tokenizer: ChatTokenizer,
) -> tuple[dict[int, int], list[tuple[int, tuple[str | int, ...]]]]:
    """Return offset in the rendering -> trained turn that generation would start there, and the prompts."""
    ends = _slot_ends(parts, markers)
    cuts, prompts = {}, []
    for number, turn in enumerate(shape.turns):
        if not turn.trained:
            continue
        if not any(slot.turn == number for slot in slots):
            raise RowFaultError(RejectReason.EMPTY_ANSWER, f"turn {number + 1} is empty")
        prompt = _render(tokenizer, shape, markers.texts, number, RejectReason.SPAN_UNPROVABLE)
        if not rendering.startswith(prompt):
            raise RowFaultError(RejectReason.SPAN_UNPROVABLE, _prompt_differs(number, prompt, rendering, markers))
        for slot, end in ends:
            if (end <= len(prompt)) != (slots[slot].turn < number):
                raise RowFaultError(
                    RejectReason.SPAN_UNPROVABLE, f"the template moves contents across the start of turn {number + 1}"
                )
        cuts[len(prompt)] = number
        prompts.append((number, tuple(markers.split(prompt))))
    return cuts, prompts


def _slot_ends(parts: Sequence[str | int], markers: _Markers) -> list[tuple[int, int]]:
    """Return each slot number in ``parts`` with the offset of its end."""
    ends, offset = [], 0
    for part in parts:
        offset += len(markers.texts[part] if isinstance(part, int) else part)
        if isinstance(part, int):
            ends.append((part, offset))
    return ends


def _prompt_differs(number: int, prompt: str, rendering: str, markers: _Markers) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, rendering, strict=False)) if a != b),
        min(len(prompt), len(rendering)),
    )
    start = max(0, same - 20)
    asked, shown = (
        fill(markers.split(text[start : same + 30]), ["..."] * len(markers.texts)) for text in (prompt, rendering)
    )
    return f"generation is asked for turn {number + 1} by {asked!r}, but the conversation shows {shown!r}"


def _check_whole(
    prompts: Sequence[tuple[int, tuple[str | int, ...]]],
    pieces: Sequence[Piece],
    slots: Sequence[Slot],
    tokenizer: ChatTokenizer,
) -> None:
    """See that the pieces of the first prompt give the ids that the tokenizer gives for it as a whole."""
    if not prompts:
        return
    samples = [_SAMPLE] * len(slots)
    (whole,) = tokenizer.encode_many([fill(prompts[0][1], samples)], reading="template")
    ids: list[int] = []
    for piece in pieces:
        if piece.turn is not None:
            break
        if piece.ids is None:
            (encoded,) = tokenizer.encode_many(
                [fill(piece.parts, samples)], reading="text", continued=piece.continued
            )
            ids += encoded
        else:
            ids += piece.ids
    if ids != whole:
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE, "the tokenizer reads a prompt otherwise than piece by piece"
        )


def _find_paddings(
    shape: Shape, parts: Sequence[str | int], markers: _Markers, tokenizer: ChatTokenizer
) -> tuple[tuple[str, str], ...]:
    """Return for each slot what the template leaves of white space before and behind it."""
    kept = {index: (_PADDING, _PADDING) for index in range(len(markers.texts))}
    padded = [f"{_PADDING}{marker}{_PADDING}" for marker in markers.texts]
    try:
        rendering = tokenizer.render(
            shape.messages(padded), tools=shape.tool_list(), add_generation_prompt=False
        )
    except DataError:
        return tuple(kept.values())
    seen = markers.split(rendering)
    if [part for part in seen if isinstance(part, int)] != [part for part in parts if isinstance(part, int)]:
        return tuple(kept.values())
    gaps, fixed = _gaps(seen), _gaps(parts)
    numbers = [part for part in parts if isinstance(part, int)]
    for position, (gap, text) in enumerate(zip(gaps, fixed, strict=True)):
        behind, before = _split_gap(gap, text, first=position == 0, last=position == len(gaps) - 1)
        if position > 0:
            kept[numbers[position - 1]] = (kept[numbers[position - 1]][0], behind)
        if position < len(numbers):
            kept[numbers[position]] = (before, _PADDING)
    return tuple(kept.values())


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
    choices = ("", " \n", "\n ", "\n", _PADDING)
    for behind in ("",) if first else choices:
        for before in ("",) if last else choices:
            if behind + fixed + before == gap:
                return behind, before
    return _PADDING, _PADDING


def _strip(text: str, before: str, behind: str) -> str:
    """Do to ``text`` what left ``before`` and ``behind`` of the padding."""
    if before != _PADDING:
        text = text.lstrip("\n") if before.startswith(" ") else text.lstrip()
    if behind != _PADDING:
        text = text.rstrip("\n") if behind.endswith(" ") else text.rstrip()
    return text
