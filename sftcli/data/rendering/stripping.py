"""What templates do to the white space around contents, found out by padding markers with some."""

from collections.abc import Sequence

PADDING = "\n \n"
Kept = tuple[str, str]  # what is left of the padding before and behind a text


def find_kept(padded: Sequence[str | int], parts: Sequence[str | int], count: int) -> tuple[Kept, ...]:
    """Return for each of ``count`` slots what a template leaves of ``PADDING`` around it.

    Args:
        padded: A rendering whose slots were padded, as fixed strings and slot numbers.
        parts: The same without padding.
        count: Slots.
    """
    kept = dict.fromkeys(range(count), (PADDING, PADDING))
    numbers = [part for part in parts if isinstance(part, int)]
    if [part for part in padded if isinstance(part, int)] != numbers:
        return tuple(kept.values())
    gaps = list(zip(_gaps(padded), _gaps(parts), strict=True))
    for position, (gap, fixed) in enumerate(gaps):
        behind, before = _split_gap(gap, fixed, first=position == 0, last=position == len(gaps) - 1)
        if position > 0:
            kept[numbers[position - 1]] = (kept[numbers[position - 1]][0], behind)
        if position < len(numbers):
            kept[numbers[position]] = (before, PADDING)
    return tuple(kept.values())


def strip(text: str, kept: Kept) -> str:
    """Do to ``text`` what left ``kept`` of the padding."""
    before, behind = kept
    if before != PADDING:
        text = text.lstrip("\n") if before.startswith(" ") else text.lstrip()
    if behind != PADDING:
        text = text.rstrip("\n") if behind.endswith(" ") else text.rstrip()
    return text


def _gaps(parts: Sequence[str | int]) -> list[str]:
    """Return the fixed texts before, between and behind the slots, empty ones included."""
    gaps = [""]
    for part in parts:
        if isinstance(part, int):
            gaps.append("")
        else:
            gaps[-1] += part
    return gaps


def _split_gap(gap: str, fixed: str, *, first: bool, last: bool) -> tuple[str, str]:
    """Return the white space at the start and the end of ``gap`` that is not in ``fixed``."""
    choices = ("", " \n", "\n ", "\n", PADDING)
    for behind in ("",) if first else choices:
        for before in ("",) if last else choices:
            if behind + fixed + before == gap:
                return behind, before
    return PADDING, PADDING
