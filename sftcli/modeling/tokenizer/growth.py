"""How long a text becomes by the methods and filters of Jinja that can make a long one of short ones, told before they do."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

_WIDTHS = re.compile(r"[0-9]{1,18}")
_NESTED = re.compile(r"\*|\{[^{}]*\{")  # a width that is an argument


def growth_of(name: str, given: Sequence[object], named: Mapping[str, object]) -> int:
    """Return at least the length of what ``name`` makes of the text ``given[0]``; 0 where it grows no more than it was given.

    Args:
        name: Of the method, the filter, or "%".
        given: The text, and the arguments that have no name.
        named: The others.
    """
    grow = _GROWING.get(name)
    if grow is None or not given:
        return 0
    others = [*given[1:], *named.values()]
    text = given[0]
    if name == "join" and not isinstance(text, str):  # the filter, whose separator comes second
        size = len(text) if isinstance(text, list | tuple) else 0
        return size * _longest(others)
    return grow(text, others) if isinstance(text, str) else 0


def _longest(values: Iterable[object]) -> int:
    """Return the largest of numbers, lengths of texts, and both inside of collections."""
    most = 0
    for value in values:
        if isinstance(value, str):
            most = max(most, len(value))
        elif isinstance(value, int):
            most = max(most, abs(value))
        elif isinstance(value, Mapping):
            most = max(most, _longest(value.values()))
        elif isinstance(value, list | tuple):
            most = max(most, len(value), _longest(value))
    return most


def _replaced(text: str, others: Sequence[object]) -> int:
    old, new = (*others, "", "")[:2]
    times = text.count(old) if isinstance(old, str) else 0
    return len(text) + times * (len(new) if isinstance(new, str) else 0)


def _joined(text: str, others: Sequence[object]) -> int:
    items = others[0] if others else ()
    count = len(items) if isinstance(items, str | list | tuple | dict) else 0
    return count * len(text)


def _formatted(text: str, others: Sequence[object]) -> int:
    fields = text.count("{") + text.count("%")
    widths = [int(width) for width in _WIDTHS.findall(text)] if fields else []
    nested = _longest(others) if _NESTED.search(text) else 0
    return fields * (max(widths, default=0) + nested + _deepest(others))


def _deepest(values: Sequence[object]) -> int:
    """Return about how long the longest of ``values`` is as text; they were walked through already."""
    return max((len(value) if isinstance(value, str) else len(str(value)) for value in values), default=0)


def _per_line(text: str, others: Sequence[object]) -> int:
    return text.count("\n") * _longest(others)


def _per_char(text: str, others: Sequence[object]) -> int:
    return len(text) * _longest(others)


_GROWING: Mapping[str, Callable[[str, Sequence[object]], int]] = {
    "replace": _replaced,
    "join": _joined,
    "translate": _per_char,
    "expandtabs": lambda text, others: text.count("\t") * _longest(others),
    "indent": _per_line,
    "wordwrap": lambda text, others: (
        len(text) * max((len(one) for one in others if isinstance(one, str)), default=0)
    ),
    "format": _formatted,
    "format_map": _formatted,
    "%": _formatted,
}
