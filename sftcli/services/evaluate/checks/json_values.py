"""JSON as the standard has it: no NaN, and ``true`` is not 1."""

import json
from typing import NoReturn


def read_json_value(text: str) -> object:
    """Return the value of a text that is JSON and nothing else.

    Raises:
        ValueError: It is not.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_json_text(text: str) -> bool:
    """Return whether a text is an object or a list in JSON; a bare word or number is not counted."""
    try:
        return isinstance(read_json_value(text), dict | list)
    except ValueError:
        return False


def are_equal(first: object, second: object) -> bool:
    """Return whether two JSON values are the same: keys in any order, 1 as 1.0, and true not as 1."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            are_equal(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(are_equal, first, second))
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
