"""YAML to rows: a list of objects, or one object a document. Words and numbers are those of YAML 1.2.

So ``no`` is a word, ``12:30`` a text, and so is a date. Nothing but plain values is made. An alias may repeat a text and not a list or
an object: a few lines of those would become more than any memory holds.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sftcli.data.reading.json_rows import MAX_DEPTH, Row, check_values, json_type
from sftcli.data.reading.text_lines import ByteStream, Note, data_error, whole_text
from sftcli.errors import DataError

if TYPE_CHECKING:
    from yaml import Event, YAMLError

MAX_BYTES = 16 * 2**20
_WORDS = (
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)"), "-+0123456789"),
    (
        "float",
        re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
        "-+.0123456789",
    ),
    ("merge", re.compile(r"<<"), "<"),
)


def yaml_rows(stream: ByteStream, name: str, note: Note) -> Iterator[Row]:
    """Yield the rows of YAML text with the line that each begins on.

    Raises:
        DataError: The text is not such YAML, or too long.
    """
    import yaml

    text = whole_text(
        stream,
        name,
        note,
        max_bytes=MAX_BYTES,
        too_long=f"YAML of more than {MAX_BYTES // 2**20} MB is not supported",
        hint="convert it to JSON lines, one object per line",
    )
    try:
        _check_events(yaml.parse(text, Loader=_loader()), name)
        loader = _loader()(text)
        while loader.check_node():
            document = loader.get_node()
            is_list = isinstance(document, yaml.SequenceNode)
            for node in document.value if is_list else [document]:
                line = node.start_mark.line + 1
                yield line, _fields(loader.construct_document(node), name, line)
    except yaml.YAMLError as error:
        raise _fault(error, name) from None


@lru_cache(maxsize=1)
def _loader() -> Any:  # noqa: ANN401 - PyYAML has no types
    """Return the class that loads plain values, and takes for a number or a word what YAML 1.2 does."""
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("PlainLoader", (base,), {"yaml_implicit_resolvers": {}})
    for kind, pattern, first in _WORDS:
        whole = re.compile(rf"(?:{pattern.pattern})\Z")
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", whole, ["", *first.replace("\0", "")])
    return loader


def _check_events(events: "Iterable[Event]", name: str) -> None:
    """See that nothing grows when it is loaded, and that it is not nested too deeply."""
    import yaml

    depth, repeatable = 0, set[str]()
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise data_error(f"lists and objects are nested more than {MAX_DEPTH} deep", name, line)
            repeatable.discard(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and event.anchor:
            repeatable.add(event.anchor)
        elif isinstance(event, yaml.AliasEvent) and event.anchor not in repeatable:
            raise data_error(
                f"the alias *{event.anchor} repeats a list or an object",
                name,
                line,
                hint="write it out there; an alias may repeat a text",
            )


def _fields(value: object, name: str, line: int) -> dict[str, object]:
    if not isinstance(value, dict):
        raise data_error(f"the row is {json_type(value)}, expected an object with named columns", name, line)
    _check_plain(value, name, line)
    check_values(value, name, line)
    return value


def _check_plain(value: object, name: str, line: int) -> None:
    """See that a value is one that JSON has too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise data_error(
                    f"the name {key!r} is {json_type(key)}, expected text",
                    name,
                    line,
                    hint=f'put it in quotes: "{key}"',
                )
            _check_plain(inner, name, line)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, name, line)
    elif not isinstance(value, str | int | float | None):
        raise data_error(f"a value is {json_type(value)}, expected a plain one", name, line)


def _fault(error: "YAMLError", name: str) -> DataError:
    mark = getattr(error, "problem_mark", None)
    place = (mark.line + 1, mark.column + 1) if mark else (1, None)
    return data_error(f"broken YAML: {getattr(error, 'problem', '') or error}", name, *place)
