r"""Where generation would start each answer of a conversation, and where its loss starts.

A template that asks for an answer as it shows one needs nothing more: the text of the conversation begins with the prompt. Many
ask otherwise, at least for earlier answers: they open a thought that history lacks, or show the system text with the last question
only. Where one answer is trained and stands last, its text is put together from both: the prompt as generation sees it, and what
the template writes behind its header when the answer is there::

    asked   ... <|im_start|>assistant\n<think>\n
    shown   ... <|im_start|>assistant\n{answer}<|im_end|>\n
    trained ... <|im_start|>assistant\n<think>\n || {thinking}\n</think>\n\n{answer}<|im_end|>\n
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftcli.data.conversations.messages import RejectReason, RowFaultError
from sftcli.data.rendering.conversation_shape import CLOSING, ConversationShape, Slot
from sftcli.data.rendering.markers import Markers, fill, render
from sftcli.data.rendering.segments import CONTEXT_CHARS, Cut, first_difference
from sftcli.data.rendering.tokenizer import ChatTokenizer
from sftcli.errors import DataError

# Pairs of what opens and closes thinking in the templates of many models.
_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_OPENS = "|".join(re.escape(opening) for opening, _ in _TAGS)
_CLOSES = "|".join(re.escape(closing) for _, closing in _TAGS)
_OPENED = re.compile(rf"(?:{_OPENS})\s*(?P<closed>(?:{_CLOSES})\s*)?\Z")
_EMPTY = re.compile(rf"\s*(?:{_OPENS})\s*(?:{_CLOSES})\s*")
_CLOSED = re.compile(rf"(?:{_CLOSES}|<\|end\|>)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A conversation as text with markers, and where its answers start.

    ``shown`` is what the template makes of the conversation, ``text`` what is trained on; they differ where the prompt of generation
    was put in front of an answer.
    """

    shown: str
    text: str
    prompts: Mapping[int, str]  # trained turn -> the text that asks for it; ``text`` starts with each
    starts: frozenset[int]  # offsets of ``text`` at which generation would start another answer


def find_asked(
    shape: ConversationShape, slots: Sequence[Slot], shown: str, markers: Markers, tokenizer: ChatTokenizer
) -> Asked:
    """Return where the answers of ``shown``, the rendering of ``shape`` with markers, start.

    Raises:
        RowFaultError: The template drops, repeats or moves a text, or asks for an answer otherwise than it shows one.
    """
    text = shown
    try:
        check_places(markers.split(text), slots)
        prompts = _find_prompts(shape, slots, text, markers, tokenizer)
    except RowFaultError:
        joined = _join(shape, slots, shown, markers, tokenizer)
        if joined is None:
            raise
        text = joined
        check_places(markers.split(text), slots)
        prompts = _find_prompts(shape, slots, text, markers, tokenizer)
    return Asked(
        shown=shown,
        text=text,
        prompts=prompts,
        starts=_other_starts(shape, text, markers, tokenizer),
    )


def find_cuts(asked: Asked, slots: Sequence[Slot], markers: Markers, *, trains_lead: bool) -> dict[int, Cut]:
    """Return the places of ``asked.text`` that no token may straddle, by offset.

    Args:
        asked: The text.
        slots: Of the text.
        markers: In it.
        trains_lead: Whether what generation would write in front of an answer has loss: its thinking, or the empty form of it.

    Raises:
        RowFaultError: It is not to be trained, and where it ends cannot be told.
    """
    cuts = {offset: Cut() for offset in asked.starts}
    for turn, prompt in asked.prompts.items():
        begin = len(prompt)
        if not trains_lead:
            cuts[begin] = Cut()
            begin = _behind_lead(asked.text, begin, turn, slots, markers)
        cuts[begin] = Cut(turn)
        cuts |= _cuts_within(asked.text, begin, turn, slots, markers)
    return dict(sorted(cuts.items()))


def _cuts_within(text: str, begin: int, turn: int, slots: Sequence[Slot], markers: Markers) -> dict[int, Cut]:
    """Return where the parts of the answer of ``turn`` that are context begin and end.

    What the template writes behind the last text of the answer, such as its stop token, has loss where that text has.
    """
    own = [index for index, slot in enumerate(slots) if slot.turn == turn and not slot.is_thought]
    cuts = {}
    for index in own:
        if not slots[index].has_loss:
            place = text.index(markers.texts[index], begin)
            cuts[place] = Cut(turn, has_loss=False, is_within=place > begin)
            if any(slots[other].has_loss for other in own if other > index):
                cuts[place + len(markers.texts[index])] = Cut(turn, is_within=True)
    return cuts


def is_empty_thought(text: str) -> bool:
    """Return whether ``text`` is no more than what a template writes in front of an answer that does not think."""
    return not text or _EMPTY.fullmatch(text) is not None


def check_places(parts: Sequence[str | int], slots: Sequence[Slot]) -> None:
    """See that every text has its place, and a trained content only one; a tool's name may be written again."""
    places = _places(parts)
    for index, slot in enumerate(slots):
        count = places.count(index)
        if count == 0 and (slot.trained or not slot.is_thought):
            what = "thinking" if slot.is_thought else "tool call" if slot.is_argument else "content"
            raise RowFaultError(
                RejectReason.TEMPLATE_DROPS,
                f"the template drops the {what} of turn {slot.turn + 1} ({slot.role})",
            )
        if count > 1 and slot.trained and not slot.is_argument:
            raise RowFaultError(
                RejectReason.TEMPLATE_REWRITES, f"the template writes turn {slot.turn + 1} {count} times"
            )


def _places(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def _find_prompts(
    shape: ConversationShape, slots: Sequence[Slot], text: str, markers: Markers, tokenizer: ChatTokenizer
) -> dict[int, str]:
    """Return for each trained turn the text that asks for it, which ``text`` starts with."""
    ends = _first_ends(text, markers)
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
        if not text.startswith(prompt):
            raise RowFaultError(RejectReason.SPAN_UNPROVABLE, _prompt_differs(number, prompt, text, markers))
        if any((end <= len(prompt)) != (slots[slot].turn < number) for slot, end in ends.items()):
            detail = f"the template moves contents across the start of turn {number + 1}"
            raise RowFaultError(RejectReason.SPAN_UNPROVABLE, detail)
        prompts[number] = prompt
    return prompts


def _first_ends(text: str, markers: Markers) -> dict[int, int]:
    """Return the offset of the end of each slot, where it stands first."""
    ends: dict[int, int] = {}
    offset = 0
    for part in markers.split(text):
        offset += len(markers.texts[part] if isinstance(part, int) else part)
        if isinstance(part, int):
            ends.setdefault(part, offset)
    return ends


def _prompt_differs(number: int, prompt: str, text: str, markers: Markers) -> str:
    asked, shown = (fill(markers.split(each), ["..."] * len(markers.texts)) for each in (prompt, text))
    start = max(0, first_difference(asked, shown) - CONTEXT_CHARS // 2)
    asked, shown = asked[start : start + CONTEXT_CHARS], shown[start : start + CONTEXT_CHARS]
    return f"generation is asked for turn {number + 1} by {asked!r}, but the conversation shows {shown!r}"


def _other_starts(
    shape: ConversationShape, text: str, markers: Markers, tokenizer: ChatTokenizer
) -> frozenset[int]:
    """Return where generation would have started the answers that are not trained, as far as the template shows it."""
    starts = set[int]()
    for number, turn in enumerate(shape.turns):
        if turn.role != "assistant" or turn.trained or not number:
            continue
        try:
            prompt = render(shape, markers.texts, tokenizer, num_turns=number, asks=True)
        except DataError:
            continue
        if text.startswith(prompt):
            starts.add(len(prompt))
    return frozenset(starts)


def _join(
    shape: ConversationShape, slots: Sequence[Slot], shown: str, markers: Markers, tokenizer: ChatTokenizer
) -> str | None:
    """Return the prompt of the last turn with the answer behind it; None where that cannot be put together."""
    last = len(shape.turns) - 1
    if [number for number, turn in enumerate(shape.turns) if turn.trained] != [last]:
        return None
    try:
        prompt = render(shape, markers.texts, tokenizer, num_turns=last, asks=True)
    except DataError:
        return None
    ends = {slot: end for slot, end in _first_ends(shown, markers).items() if slots[slot].turn < last}
    asked_ends = _first_ends(prompt, markers)
    if not ends or not asked_ends:
        return None
    question = max(ends, key=ends.__getitem__)
    if question != max(asked_ends, key=asked_ends.__getitem__):
        return None
    asks, answers = prompt[asked_ends[question] :], shown[ends[question] :]
    if answers.startswith(asks):
        return prompt + answers.removeprefix(asks)
    thinking = [
        markers.texts[index] for index, slot in enumerate(slots) if slot.turn == last and slot.is_thought
    ]
    return _behind_opened_thought(prompt, asks, answers, thinking)


def _behind_opened_thought(prompt: str, asks: str, answers: str, thinking: Sequence[str]) -> str | None:
    """Return ``prompt``, whose end ``asks`` opens a thought, with that thought and the answer of ``answers`` behind it."""
    opened = _OPENED.search(asks)
    if opened is None or not answers.startswith(asks[: opened.start()]):
        return None
    answer = answers[opened.start() :]
    if empty := _EMPTY.match(answer):
        answer = answer[empty.end() :]
    if any(thought in answer for thought in thinking):
        return None
    if opened["closed"]:
        return None if thinking else prompt + answer
    if not opened.group().startswith(_TAGS[0][0]):
        return None  # how others close a thought is for their templates to say
    return f"{prompt}{''.join(thinking)}{CLOSING}{answer.lstrip()}"


def _behind_lead(text: str, begin: int, turn: int, slots: Sequence[Slot], markers: Markers) -> int:
    """Return where the answer of ``turn`` starts behind its thinking, or behind the empty form of it, if there is any."""
    own = [
        (index, text.find(markers.texts[index], begin))
        for index, slot in enumerate(slots)
        if slot.turn == turn
    ]
    thoughts = [
        place + len(markers.texts[index]) for index, place in own if slots[index].is_thought and place >= 0
    ]
    answers = [place for index, place in own if not slots[index].is_thought and place >= 0]
    if not answers:
        raise RowFaultError(RejectReason.EMPTY_ANSWER, f"turn {turn + 1} holds nothing but thinking")
    behind = max(thoughts, default=begin)
    found = _CLOSED.search(text, behind, min(answers))
    if found:
        return found.end()
    if not thoughts:
        return begin
    if any(slots[index].is_argument for index, place in own if place == min(answers)):
        raise RowFaultError(
            RejectReason.SPAN_UNPROVABLE,
            f"where the thinking of turn {turn + 1} ends cannot be told from its call",
        )
    return min(answers)
