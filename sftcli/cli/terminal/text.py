"""Text for a terminal: numbers as people read them, foreign text made harmless, signs that every encoding has.

Everything a view prints goes through here, so that one quantity looks the same everywhere, and so that no byte from
data, a path or a model can command the terminal.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from sftcli.figures import loss_figure

_MAX_CURVE = 1e30  # sums of larger values could overflow

# C0 and C1 controls, DEL, the line separators that are not "\n", and the marks that reorder the text around them.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """The drawing characters of a view, in one encoding."""

    bar: str
    rest: str
    levels: str  # of a sparkline, low to high
    arrow: str
    ellipsis: str


UNICODE_SIGNS = Signs(bar="━", rest="─", levels="▁▂▃▄▅▆▇█", arrow="→", ellipsis="…")
ASCII_SIGNS = Signs(bar="=", rest="-", levels="_.-:=+*#", arrow="->", ellipsis="...")


def signs(encoding: str | None) -> Signs:
    """Return the drawing characters that ``encoding`` can write."""
    return UNICODE_SIGNS if (encoding or "").lower().startswith("utf") else ASCII_SIGNS


def clean(text: str, *, keep: str = "") -> str:
    r"""Return ``text`` with every character that could command a terminal made visible, as in ``\x1b``.

    Args:
        text: Anything from outside: data, paths, model output, messages of other libraries.
        keep: Control characters that stay as they are, such as ``"\n\t"`` for text of several lines.
    """

    def visible(match: re.Match[str]) -> str:
        char = match[0]
        if char in keep:
            return char
        code = ord(char)
        return _NAMED.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return _HARMFUL.sub(visible, text)


def writable(text: str, encoding: str | None) -> str:
    r"""Return ``text`` with what ``encoding`` cannot write as ``\u`` escapes, so that its width is known."""
    name = encoding or "utf-8"
    return text.encode(name, "backslashreplace").decode(name)


def wrapped(text: str, columns: int) -> str:
    """Return ``text`` with its lines broken between words after ``columns``, later rows set in.

    A command in backquotes stays whole where it fits on a row of its own; a longer word is left to the terminal.
    """
    return "\n".join(row for line in text.split("\n") for row in _rows(line, columns))


def _rows(line: str, columns: int) -> list[str]:
    if len(line) <= columns or line.isspace():
        return [line]
    margin = line[: len(line) - len(line.lstrip())]
    hang = margin + "  "
    words = list(_kept_together(line.split(), columns - len(hang)))
    rows = [margin + words[0]]
    for word in words[1:]:
        if len(rows[-1]) + 1 + len(word) <= columns:
            rows[-1] += f" {word}"
        else:
            rows.append(hang + word)
    return rows


def _kept_together(words: Sequence[str], room: int) -> Iterator[str]:
    """Yield ``words``, those from an opening backquote to the one that closes it as one where that fits into ``room``."""
    begun: list[str] = []
    for word in words:
        begun.append(word)
        together = " ".join(begun)
        if together.count("`") % 2 == 0 and len(together) <= room:
            yield together
            begun = []
        elif len(together) > room:
            yield from begun
            begun = []
    yield from begun


def as_utf8(text: str) -> str:
    """Return what was typed or piped as the text that its bytes are in UTF-8.

    In the C locale Python makes surrogates of all that is not ASCII.

    Raises:
        UnicodeError: The bytes are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode("utf-8")
    return text


def loss_text(loss: float | None, rows: int = 0) -> str:
    """Return a loss with the decimals that it carries when it was measured on ``rows``, or "not finite"."""
    return loss_figure(loss, rows)


def norm_text(norm: float) -> str:
    """Return a gradient norm with two digits, or "not finite"."""
    if not isfinite(norm):
        return "not finite"
    return f"{norm:.1f}" if 0.1 <= norm < 1000 else f"{norm:.1e}" if norm else "0.0"


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """Return ``values`` as a curve of at most ``width`` characters; values that are not finite are left out."""
    finite = [max(-_MAX_CURVE, min(_MAX_CURVE, value)) for value in values if isfinite(value)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [index * len(finite) // columns for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0  # that of tiny numbers has no finite reciprocal
    return "".join(levels[round((mean - low) / span * (len(levels) - 1))] for mean in means)
