"""Text with slots, cut into segments that are tokenized one by one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag

from sftcli.data.conversations.messages import RejectReason, RowFaultError
from sftcli.data.conversations.remedies import name_stop_token
from sftcli.data.rendering.conversation_shape import Slot
from sftcli.data.rendering.tokenizer import ChatTokenizer

CONTEXT_CHARS = 40  # of a text that is quoted in a fault


def first_difference(left: str, right: str) -> int:
    """Return the first place where two texts differ, or the length of the shorter one."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


class ControlFinder:
    """Finds the texts of control and markup tokens in other text, the longest at each place."""

    def __init__(self, control_texts: Mapping[str, int]) -> None:
        self._ids = control_texts
        self._starts = tuple({text[0] for text in control_texts})
        longest_first = sorted(control_texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")

    def search(self, text: str) -> str:
        """Return the first control text in ``text``, or an empty string."""
        for character in self._starts:  # many times faster than the pattern
            if character in text:
                found = self._pattern.search(text)
                return found.group() if found else ""
        return ""

    def ids_in(self, text: str) -> set[int]:
        """Return the ids whose texts stand in ``text``."""
        if not self.search(text):
            return set()
        return {self._ids[found] for found in self._pattern.findall(text)}

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield ``text`` in order: plain stretches with None, control texts with their id."""
        end = 0
        for found in self._pattern.finditer(text):
            if found.start() > end:
                yield text[end : found.start()], None
            yield found.group(), self._ids[found.group()]
            end = found.end()
        if end < len(text):
            yield text[end:], None


@dataclass(frozen=True, slots=True)
class Cut:
    """A place that no token may straddle: generation would start there. ``turn`` is trained from there on, where it is one.

    One ``is_within`` a turn: only whether there is loss changes.
    """

    turn: int | None = None
    has_loss: bool = True
    is_within: bool = False


class Places(IntFlag):
    """What stands at a token."""

    TRAINED = 1
    ANSWERS = 2  # content of the assistant, which may hold markup
    OTHERS = 4  # content of somebody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of text between cuts.

    ``ids`` are there where no slot is inside, and empty for white space that a control token swallows. ``turn`` is the
    trained turn the segment belongs to; of it a part that is context has no loss. ``continued`` tells that nothing may be
    put in front of it. In an ``is_free`` one the contents are read as the template is: they may write control tokens.
    """

    parts: tuple[str | int, ...]
    ids: tuple[int, ...] | None
    turn: int | None
    has_loss: bool = True
    continued: bool = False
    is_answer: bool = False  # every slot inside is an assistant's
    is_free: bool = False
    places: int = field(init=False)  # ``Places`` of its tokens

    def __post_init__(self) -> None:
        content = (
            0 if self.ids is not None or self.is_free else Places.ANSWERS if self.is_answer else Places.OTHERS
        )
        # A plain number: arithmetic with flags is slow, and this is read for every segment of every row.
        object.__setattr__(self, "places", int(content) | (Places.TRAINED.value if self.is_trained else 0))

    @property
    def is_trained(self) -> bool:
        """Whether its tokens have loss."""
        return self.turn is not None and self.has_loss


def cut_into_segments(
    parts: Sequence[str | int | Cut],
    slots: Sequence[Slot],
    tokenizer: ChatTokenizer,
    controls: ControlFinder,
) -> tuple[tuple[Segment, ...], bool]:
    """Return the segments of ``parts``, and whether a stop token had to be put behind the last answer.

    Raises:
        RowFaultError: A trained turn does not end in a stop token.
    """
    cutter = _Cutter(slots, tokenizer)
    for part in parts:
        if isinstance(part, Cut):
            cutter.cut(part)
        elif isinstance(part, int):
            cutter.add_slot(part)
        else:
            for text, control in controls.split(part):
                cutter.add_text(text) if control is None else cutter.add_control(text, control)
    return cutter.finish()


class _Cutter:
    """Collects segments from left to right."""

    def __init__(self, slots: Sequence[Slot], tokenizer: ChatTokenizer) -> None:
        self.slots = slots
        self.tokenizer = tokenizer
        self.segments: list[Segment] = []
        self.section: list[str | int] = []  # text since the last cut
        self.turn: int | None = None  # the trained turn that is open
        self.has_loss = True  # what stands in it now
        self.waiting = set[int]()  # slots of it that are still to come
        self.passed: list[tuple[str, int]] = []  # control tokens behind its last slot
        self.swallows = False  # the last control token takes the white space behind it

    def cut(self, cut: Cut) -> None:
        self._flush()
        self.has_loss = cut.has_loss
        if cut.is_within:
            return
        self._check_closed()
        if cut.turn is None:
            return
        self.turn, self.passed = cut.turn, []
        self.waiting = {
            index
            for index, slot in enumerate(self.slots)
            if slot.turn == cut.turn and (slot.has_loss or not slot.is_thought)
        }

    def add_slot(self, slot: int) -> None:
        if self.turn is not None and not self.waiting:
            self._check_closed()
        self.waiting.discard(slot)
        self.section.append(slot)
        self.swallows = False

    def add_text(self, text: str) -> None:
        if self.swallows and (space := text[: len(text) - len(text.lstrip())]):
            self._add_swallowed(space)
            text = text[len(space) :]
        self.swallows = False
        if text:
            self.section.append(text)

    def add_control(self, text: str, token: int) -> None:
        last = self.section[-1] if self.section else ""
        space = last[len(last.rstrip()) :] if isinstance(last, str) else ""
        if space and self._reads_as(space + text, token):
            self.section[-1] = str(last)[: -len(space)]
        else:
            space = ""
        self._flush()
        if space:
            self._add_swallowed(space)
        self.segments.append(Segment(parts=(text,), ids=(token,), turn=self.turn, has_loss=self.has_loss))
        self.swallows = self._reads_as(text + "\n", token)
        if self.turn is not None and not self.waiting:
            self._pass_control(text, token)

    def finish(self) -> tuple[tuple[Segment, ...], bool]:
        self._flush()
        append = self.turn is not None and not self.passed
        if append:
            (ids,) = self.tokenizer.encode_many([self.tokenizer.eos_text], reading="template")
            self.segments.append(Segment(parts=(), ids=tuple(ids), turn=self.turn, has_loss=self.has_loss))
        else:
            self._check_closed()
        return tuple(self.segments), append

    def _pass_control(self, text: str, token: int) -> None:
        """Close the turn at a stop token; a template may write other control tokens in front of it."""
        if token in self.tokenizer.stop_ids:
            self.turn = None
        elif token not in self.tokenizer.markup_ids:
            self.passed.append((text, token))

    def _check_closed(self) -> None:
        if self.turn is None:
            return
        if not self.passed:
            raise RowFaultError(RejectReason.NO_STOP_TOKEN, f"turn {self.turn + 1} ends in no stop token")
        passed = "".join(text for text, _ in self.passed)
        raise RowFaultError(
            RejectReason.NO_STOP_TOKEN,
            f"turn {self.turn + 1} ends in {passed!r}, at which generation does not stop",
            remedy=name_stop_token(*self.passed[0]),
        )

    def _add_swallowed(self, space: str) -> None:
        self.segments.append(Segment(parts=(space,), ids=(), turn=self.turn, has_loss=self.has_loss))

    def _reads_as(self, text: str, token: int) -> bool:
        return self.tokenizer.encode_many([text], reading="template") == [[token]]

    def _flush(self) -> None:
        parts = tuple(part for part in self.section if part != "")
        self.section = []
        if not parts:
            return
        continued = self._is_continued()
        slots = [self.slots[part] for part in parts if isinstance(part, int)]
        ids = None
        if not slots:
            text = "".join(str(part) for part in parts)
            ids = tuple(self.tokenizer.encode_many([text], reading="answer", continued=continued)[0])
        self.segments.append(
            Segment(
                parts=parts,
                ids=ids,
                turn=self.turn,
                has_loss=self.has_loss,
                continued=continued,
                is_answer=bool(slots) and all(slot.role == "assistant" for slot in slots),
            )
        )

    def _is_continued(self) -> bool:
        """Return whether the tokenizer, reading all of the text, would put no space in front of the next segment."""
        match self.tokenizer.prefix_space:
            case "never":
                return False
            case "first":
                return bool(self.segments)
            case "always":
                return bool(self.segments) and not self._behind_control()

    def _behind_control(self) -> bool:
        ids = self.segments[-1].ids
        return ids is not None and (not ids or ids[-1] in self.tokenizer.control_texts.values())
