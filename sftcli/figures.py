"""Numbers and values of settings as people read them: one form for the terminal, the page, the card and the verdict.

A measured one has no more digits than the rows that it was computed on carry. A count of 0 rows says that it is not known,
as in logs that hold none; all digits stand there.
"""

import re
from collections.abc import Sequence
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
    if low == high:  # draws of rows that all agree agree too, whatever other rows would do
        return f"no interval: all {rows:,} rows agree"
    return f"95% interval {low:+.{digits}f} to {high:+.{digits}f}"


def too_few(rows: int) -> str:
    """Return ``3 rows are too few``."""
    return f"{rows} {'row is' if rows == 1 else 'rows are'} too few"


def counted(number: int, noun: str) -> str:
    """Return ``1 row`` or ``2,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def carried(digits: int, rows: int) -> int:
    """Return how many of ``digits`` decimals a mean over ``rows`` carries."""
    return max(0, digits - 2) if are_few(rows) else digits


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


def size(num_bytes: float) -> str:
    """Return a size as ``512 B`` or ``2.1 GB``, in steps of 1000."""
    if num_bytes < 1000:
        return f"{round(num_bytes)} B"
    return _scaled(num_bytes, (" kB", " MB", " GB"), " TB")


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
    return _scaled(number, ("k", "M", "B"), "T")


def _scaled(number: float, units: Sequence[str], last: str) -> str:
    """Return ``number`` with one decimal in the first of ``units``, each a thousand of the one before, that keeps it below 1000."""
    for unit in units:
        number /= 1000
        if number < 999.95:
            return f"{number:.1f}{unit}"
    return f"{number / 1000:.1f}{last}"


def rate_text(learning_rate: float) -> str:
    """Return a learning rate as ``2.0e-04``."""
    return f"{learning_rate:.1e}" if isfinite(learning_rate) else "not finite"


def percent(fraction: float) -> str:
    """Return a fraction of 1 as ``12%``."""
    return f"{100 * fraction:.0f}%" if isfinite(fraction) else "?"


def setting_text(value: object) -> str:
    """Return the value of a setting for people: no notation of Python."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(setting_text(item) for item in value) or "none"
    return str(value)


def fraction_of(text: str) -> float:
    """Return the share that ``20%`` or ``0.2`` is.

    Raises:
        ValueError: It is neither.
    """
    number = text.strip().removesuffix("%")
    try:
        found = float(number)
    except ValueError:
        raise ValueError(f"{text!r} is not a share such as 0.2 or 20%") from None
    return found / 100 if number != text.strip() else found


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
