"""Characters that tell of an accident on a text's way: unreadable ones, bytes read in the wrong encoding, controls."""

import re
from collections.abc import Iterable

from sftcli.data.example import RowFlag

_NO_CONTROLS = bytes([*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0x100)])
_LATER_CONTROLS = re.compile("[\x80-\x9f]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# How the bytes 0x80 to 0xBF, which go on a character in UTF-8, read in Latin-1 and in Windows-1252.
_WINDOWS = bytes(byte for byte in range(0x80, 0xA0) if byte not in b"\x81\x8d\x8f\x90\x9d").decode("cp1252")
_GOES_ON = f"\x80-\xbf{_WINDOWS}"
# Behind a capital Â or Ã real text has quotes, dashes and dots too, so they tell nothing there.
_LETTER_GOES_ON = "\x80-\xbf" + re.sub("[…‘’“”–—]", "", _WINDOWS)  # noqa: RUF001
_MISREAD = re.compile(f"[ÂÃ][{_LETTER_GOES_ON}]|â[\x80€][{_GOES_ON}]|ð[\x9fŸ][{_GOES_ON}]{{2}}")
_STARTS = "ÂÃâð"


def find_trouble(texts: Iterable[str]) -> frozenset[RowFlag]:
    """Return what is wrong with the characters of ``texts``, which are valid Unicode."""
    text = "\n".join(texts)
    data = text.encode()
    strange = bool(data.translate(None, _NO_CONTROLS))
    if len(data) == len(text):
        return frozenset({RowFlag.CONTROL_CHARACTER}) if strange else frozenset()
    found = set()
    if _REPLACEMENT in text:
        found.add(RowFlag.UNREADABLE)
    if any(start in text for start in _STARTS) and _MISREAD.search(text):
        found.add(RowFlag.MISREAD)
    elif strange or (b"\xc2" in data and _LATER_CONTROLS.search(text)):  # misread text is full of them
        found.add(RowFlag.CONTROL_CHARACTER)
    return frozenset(found)
