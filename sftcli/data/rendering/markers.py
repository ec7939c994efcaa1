"""Renderings of a shape with unguessable markers in the place of its texts."""

import re
import secrets
from collections.abc import Mapping, Sequence

from sftcli.data.rendering.conversation_shape import ConversationShape
from sftcli.data.rendering.segments import Cut
from sftcli.data.rendering.tokenizer import ChatTokenizer

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

    def split_at(self, text: str, cuts: Mapping[int, Cut]) -> list[str | int | Cut]:
        """Return the same with cuts, given as offset in ``text`` -> cut, at their places."""
        parts: list[str | int | Cut] = []
        begin = 0
        for offset, cut in sorted(cuts.items()):
            parts += [*self.split(text[begin:offset]), cut]
            begin = offset
        return parts + self.split(text[begin:])


def fill(parts: Sequence[str | int], texts: Sequence[str]) -> str:
    """Return ``parts`` with a text for every number."""
    return "".join([texts[part] if isinstance(part, int) else part for part in parts])


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
    return tokenizer.render(
        messages, tools=shape.tool_list(), add_generation_prompt=asks, variables=shape.variable_values()
    )
