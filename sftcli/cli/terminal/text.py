"""Text for a terminal: numbers as people read them, foreign text made harmless, signs that every encoding has.

Everything a view prints goes through here, so that one quantity looks the same everywhere, and so that no byte from
data, a path or a model can command the terminal.
"""

import os
import re
from collections.abc import Sequence
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


def size(num_bytes: float) -> str:
    """Return a size as ``512 B`` or ``2.1 GB``, in steps of 1000."""
    if num_bytes < 1000:
        return f"{round(num_bytes)} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.95:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"


def flop_rate(flops: float) -> str:
    """Return operations per second as ``430 GFLOP/s`` or ``2.40 TFLOP/s``."""
    return f"{flops / 1e9:.0f} GFLOP/s" if flops < 0.9995e12 else f"{flops / 1e12:.2f} TFLOP/s"


def count(number: float) -> str:
    """Return a count with thousands separators."""
    return f"{round(number):,}"


def short_count(number: float) -> str:
    """Return a large count as ``134.5M``; below 10,000 as it is."""
    if number < 10_000:
        return count(number)
    for unit in ("k", "M", "B"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f}{unit}"
    return f"{number / 1000:.1f}T"


def loss_text(loss: float | None, rows: int = 0) -> str:
    """Return a loss with the decimals that it carries when it was measured on ``rows``, or "not finite"."""
    return loss_figure(loss, rows)


def norm_text(norm: float) -> str:
    """Return a gradient norm with two digits, or "not finite"."""
    if not isfinite(norm):
        return "not finite"
    return f"{norm:.1f}" if 0.1 <= norm < 1000 else f"{norm:.1e}" if norm else "0.0"


def rate_text(learning_rate: float) -> str:
    """Return a learning rate as ``2.0e-04``."""
    return f"{learning_rate:.1e}" if isfinite(learning_rate) else "not finite"


def percent(fraction: float) -> str:
    """Return a fraction of 1 as ``12%``."""
    return f"{100 * fraction:.0f}%" if isfinite(fraction) else "?"


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """Return ``values`` as a curve of at most ``width`` characters; values that are not finite are left out."""
    finite = [max(-_MAX_CURVE, min(_MAX_CURVE, value)) for value in values if isfinite(value)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [index * len(finite) // columns for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)
