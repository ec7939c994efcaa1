"""How the prompt that a server makes of a conversation differs from ours, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from sftcli.data.conversations.messages import Message
from sftcli.errors import SftError
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from sftcli.services.server.dialects import ServerPrompt, as_turns

_MARK = "qzxsystemqzx"
_AROUND = 24  # characters of a prompt that are shown on each side of a difference

SYSTEM_ADDED = "the server puts a system message in front"
SYSTEM_OTHER = "the server has another system message"
SYSTEM_LOST = "the server leaves the system message out"
TOKEN_ADDED = "the server puts a token in front"
TOKEN_LOST = "the server leaves the token in front out"
TOKENS_OTHER = "the server reads the same text as other tokens"
END_ADDED = "the server adds text before the answer"
END_LOST = "the server leaves out what stands before an answer"
TEMPLATE_OTHER = "the server has another chat template"
LENGTH_OTHER = "the server's prompts have another number of tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """``what`` is the same for every prompt that differs so; ``detail`` is of this one."""

    what: str
    detail: str


class PromptComparer:
    """Compares prompts of one model.

    Args:
        tokenizer: Of the model, with the template of its training.
    """

    def __init__(self, tokenizer: HFChatTokenizer) -> None:
        self._tokenizer = tokenizer

    def compare(
        self, messages: Sequence[Message], ours: Sequence[int], theirs: ServerPrompt
    ) -> Difference | None:
        """Return the difference; None where the ids are equal, or the texts where the server tells no ids."""
        ids = theirs.ids
        if ids is not None:
            if tuple(ours) == ids:
                return None
            if ids[1:] == tuple(ours):
                return Difference(what=TOKEN_ADDED, detail=repr(self._text(ids[:1])))
            if ids == tuple(ours[1:]):
                return Difference(what=TOKEN_LOST, detail=repr(self._text(ours[:1])))
        own = self._without_first(self._text(ours), ours)
        other = self._without_first(self._text(ids or ()) if theirs.text is None else theirs.text, ours)
        if own != other:
            return self.system(messages, own, other) or _ends(own, other) or _elsewhere(own, other)
        if ids is None:
            return None
        place = next((n for n, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), 0)
        return Difference(what=TOKENS_OTHER, detail=f"from token {place + 1} on")

    def system(self, messages: Sequence[Message], own: str, other: str) -> Difference | None:
        """Return how the system messages differ, if nothing else does: proved by rendering one of our own in their place."""
        turns = as_turns(messages)
        has_system = turns[0]["role"] == "system"
        rest = turns[1:] if has_system else turns
        head, _, tail = self._render([{"role": "system", "content": _MARK}, *rest]).partition(_MARK)
        if not tail:
            return None
        mine, theirs = _between(own, head, tail), _between(other, head, tail)
        if theirs is not None:
            return Difference(what=SYSTEM_ADDED if mine is None else SYSTEM_OTHER, detail=repr(theirs))
        # One that the template brings by itself is in what it makes of the rest too, and not where the server has it not.
        if mine is not None and (
            other == self._render(rest) or (own.endswith(other) and mine in own.removesuffix(other))
        ):
            return Difference(what=SYSTEM_LOST, detail=repr(mine))
        return None

    def own_system(self, messages: Sequence[Message], ours: Sequence[int]) -> str:
        """Return the system text of a prompt, that of the template included; "" where it has none."""
        turns = as_turns(messages)
        rest = turns[1:] if turns[0]["role"] == "system" else turns
        head, _, tail = self._render([{"role": "system", "content": _MARK}, *rest]).partition(_MARK)
        return (_between(self._without_first(self._text(ours), ours), head, tail) or "") if tail else ""

    def _render(self, turns: Sequence[dict[str, str]]) -> str:
        try:
            text = self._tokenizer.render(turns, tools=None, add_generation_prompt=True)
        except SftError:
            return ""
        return self._without_first(text, self._tokenizer.encode(text)[:1])

    def _text(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if 0 <= token < self._tokenizer.vocab_size]
        return self._tokenizer.decode_many([known])[0]

    def _without_first(self, text: str, ids: Sequence[int]) -> str:
        """Return ``text`` without the control token that begins ours: servers add it while reading a text, or show it in the text."""
        if not ids or ids[0] not in self._tokenizer.control_ids:
            return text
        return text.removeprefix(self._text(ids[:1]))


def _between(text: str, head: str, tail: str) -> str | None:
    fits = text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail)
    return text[len(head) : len(text) - len(tail)] if fits else None


def _ends(own: str, other: str) -> Difference | None:
    if other.startswith(own):
        return Difference(what=END_ADDED, detail=repr(other[len(own) :]))
    if own.startswith(other):
        return Difference(what=END_LOST, detail=repr(own[len(other) :]))
    return None


def _elsewhere(own: str, other: str) -> Difference:
    place = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), 0)
    begin = max(0, place - _AROUND // 2)
    shown = [repr(text[begin : place + _AROUND]) for text in (own, other)]
    return Difference(what=TEMPLATE_OTHER, detail=f"ours has {shown[0]} where the server has {shown[1]}")
