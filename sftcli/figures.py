"""Measured numbers as text, with no more digits than the rows that they were computed on carry.

Whatever people read, the terminal, the page, the card and the verdict, takes losses and shares of rows from here. A count
of 0 rows says that it is not known, as in logs that hold none; all digits stand there.
"""

import re
from math import isfinite

FEW_ROWS = 20  # of fewer there is no interval: a single row moves a mean by more than its second digit
NOTHING = "-"  # where nothing can be said
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_UNIT_SECONDS = (86400, 3600, 60, 1)


def are_few(rows: int) -> bool:
    """Return whether ``rows`` are too few for an interval and for all digits."""
    return 0 < rows < FEW_ROWS


def figure(value: float | None, digits: int, rows: int = 0) -> str:
    """Return ``value``, measured on ``rows``, with ``digits`` decimals; with two fewer where the rows are few."""
    if value is None:
        return NOTHING
    if not isfinite(value):
        return "not finite"
    return f"{value:.{carried(digits, rows)}f}"


def change(value: float | None, digits: int, rows: int = 0) -> str:
    """Return a difference as ``figure`` does, with its sign; one that rounds to nothing has none."""
    if value is None or not isfinite(value):
        return NOTHING
    kept = carried(digits, rows)
    return f"{value:+.{kept}f}" if round(value, kept) else f"{0:.{kept}f}"


def loss_figure(loss: float | None, rows: int = 0) -> str:
    """Return a loss with three decimals, with one where it was measured on few rows."""
    return figure(loss, 3, rows)


def share_of(part: int, whole: int) -> str:
    """Return ``30 of 120 (25%)``; of few rows the counts alone, which say it all."""
    counts = f"{part:,} of {whole:,}"
    return counts if are_few(whole) or not whole else f"{counts} ({100 * part / whole:.0f}%)"


def interval(low: float | None, high: float | None, digits: int, rows: int = 0) -> str:
    """Return ``95% interval -0.120 to +0.010``, or why there is none."""
    if low is None or high is None or are_few(rows):
        return f"no interval: {too_few(rows)}"
    return f"95% interval {low:+.{digits}f} to {high:+.{digits}f}"


def too_few(rows: int) -> str:
    """Return ``3 rows are too few``."""
    return f"{rows} {'row is' if rows == 1 else 'rows are'} too few"


def carried(digits: int, rows: int) -> int:
    """Return how many of ``digits`` decimals a mean over ``rows`` carries."""
    return max(0, digits - 2) if are_few(rows) else digits


def gigabytes(count: int) -> str:
    """Return a size for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return a time as ``0.04s``, ``1.5s``, ``12s``, ``1m20s``, ``2h05m`` or ``3d04h``; never negative."""
    if not isfinite(seconds) or seconds >= 9.95:
        return whole_duration(seconds)
    seconds = max(0.0, seconds)
    return f"{seconds:.2f}s" if seconds < 0.995 else f"{seconds:.1f}s"


def whole_duration(seconds: float) -> str:
    """Return a time like ``duration`` but in whole seconds, for times that move on the screen."""
    if not isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def seconds_of(text: str) -> float:
    """Return the seconds of a time as ``duration`` writes it: ``90s``, ``30m``, ``1h30m`` or ``2d``.

    Raises:
        ValueError: It is nothing of that kind, or no time at all.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    parts = found.groups(default="0") if found else ()
    seconds = sum(unit * float(part) for unit, part in zip(_UNIT_SECONDS, parts, strict=False))
    if not seconds:
        raise ValueError(f"{text!r} is not a time such as 90s, 30m or 1h30m")
    return seconds
