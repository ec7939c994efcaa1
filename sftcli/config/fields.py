"""What a settings key accepts: in words for messages, and from text for the places where a value is only text."""

import json
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from typing import get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "more than"), Le: ("le", "at most"), Lt: ("lt", "less than")}
_MAX_SHOWN = 60  # characters of a wrong value that a message repeats


def leaf_fields(root: type[BaseModel], prefix: str = "") -> Mapping[str, FieldInfo]:
    """Return every field below ``root`` that is not itself a section, by dotted key, in the order of the schema."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in root.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            leaves.update(leaf_fields(kind, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = field
    return leaves


def kinds(field: FieldInfo) -> tuple[object, ...]:
    """Return the types that ``field`` accepts, ``None`` of an optional field as ``NoneType``."""
    if get_origin(field.annotation) is tuple:
        return (tuple,)
    return get_args(field.annotation) or (field.annotation,)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that ``field`` accepts; empty when it is not a choice."""
    return _words(kinds(field))


def element_choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that an element of the list ``field`` may be; empty where they are free."""
    return _words(get_args(field.annotation)) if get_origin(field.annotation) is tuple else ()


def _words(accepted: tuple[object, ...]) -> tuple[str, ...]:
    return tuple(
        member.value
        for kind in accepted
        if isinstance(kind, type) and issubclass(kind, StrEnum)
        for member in kind
    )


def allowed(field: FieldInfo) -> str:
    """Return in words which values ``field`` accepts, such as "a number, more than 0 and at most 1"."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    if words := choices(field):
        return f"one of {', '.join(words)}"
    accepted = kinds(field)
    bounds = " and ".join(
        f"{words} {getattr(bound, attribute)}"
        for bound in field.metadata
        for kind, (attribute, words) in _BOUNDS.items()
        if isinstance(bound, kind)
    )
    noun = "text that is not empty"
    if bool in accepted:
        noun = "true or false"
    elif tuple in accepted:
        noun = f"a list of texts, such as {json.dumps(field.examples or ['rows.jsonl'])}"
    elif int in accepted:
        noun = "a whole number"
    elif float in accepted:
        noun = "a number"
    return f"{noun}, {bounds}" if bounds else noun


def shown(value: object) -> str:
    """Return ``value`` as a message repeats it: on one line, quoted if it is text, cut if it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    text = repr(value.value) if isinstance(value, StrEnum) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def value_from_text(field: FieldInfo | None, text: str) -> object:
    """Read a value from an environment variable or a command line.

    Text is read as a TOML value where it is one, so ``20``, ``1e-4``, ``[1, 2]`` and ``"quoted"`` mean what they mean
    in a file, and stays text where it is not. ``field`` decides the rest: a field of text keeps ``2024`` as text, a
    list takes other text as its one element, and ``none`` unsets a field that may be unset.
    """
    value = _toml_value(text)
    if field is None:
        return value
    accepted = kinds(field)
    if type(None) in accepted and text == "none":
        return None
    if tuple in accepted:
        return _list_from_text(text, value)
    if str in accepted or choices(field):
        return value if isinstance(value, str) else text
    if isinstance(value, str) and (int in accepted or float in accepted):
        return _number_from_text(text)
    return value


def _toml_value(text: str) -> object:
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return document["value"] if len(document) == 1 else text


def _list_from_text(text: str, value: object) -> object:
    if isinstance(value, list):
        return value
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text  # a list that is written wrongly: refused by validation, not taken for a file name
    return [value if isinstance(value, str) else text]


def _number_from_text(text: str) -> object:
    """Read the numbers that TOML does not write, such as ``.5`` and ``007``; other text stays text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
