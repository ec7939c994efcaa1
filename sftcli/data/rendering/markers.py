"""Markers: texts that stand for contents while a template runs, so that their places can be found afterwards."""

import re
import secrets
from collections.abc import Mapping

from sftcli.data.rendering.segments import Cut

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
