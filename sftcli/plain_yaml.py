"""YAML as plain values, by PyYAML's safe loader: words and numbers are those of YAML 1.2.

So ``no`` is a word, ``12:30`` a text, and so is a date. An alias may repeat a text and not a list or an object: a few lines of those
would become more than any memory holds.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from yaml import Event, Node, YAMLError

_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"
# What PyYAML's constructors raise of a text that is not what its tag says: a word as a number, a number too long for Python.
_UNFIT = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
MAX_DEPTH = 100  # lists and objects in each other
_WORDS = (
    ("null", "~|null|Null|NULL|", "~nN"),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
)


class YamlFaultError(Exception):
    """What is wrong with a text, and where: lines and columns count from 1."""

    def __init__(self, text: str, line: int, column: int | None = None, *, hint: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.line = line
        self.column = column
        self.hint = hint


def yaml_documents(text: str) -> "Iterator[Node]":
    """Yield the documents of ``text`` as nodes, which know their lines; ``yaml_values`` makes values of them.

    Raises:
        YamlFaultError: It is no YAML, repeats a list by an alias, or is nested too deeply.
    """
    import yaml

    try:
        _check_events(yaml.parse(text, Loader=_loader()))
        loader = _loader()(text)
        while loader.check_node():
            yield loader.get_node()
    except yaml.YAMLError as error:
        raise _fault(error) from None


def yaml_values(nodes: "Iterable[Node]") -> "Iterator[object]":
    """Yield what each of ``nodes`` holds: texts, numbers, truth values, nothing, and lists and dictionaries of these.

    Raises:
        YamlFaultError: A tag asks for something else, or for what its text is not.
    """
    import yaml

    loader = _loader()("")
    try:
        for node in nodes:
            yield loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _fault(error) from None


def keys_as_text(mapping: "Node") -> None:
    """Let every key of ``mapping``, and of the mappings within, be the text that is written there."""
    for key, value in mapping.value:
        if key.id == "scalar" and key.tag != _MERGE:
            key.tag = _TEXT
        for inner in value.value if value.id == "sequence" else [value]:
            if inner.id == "mapping":
                keys_as_text(inner)


def yaml_places(mapping: "Node", path: tuple[str, ...] = ()) -> "Iterator[tuple[tuple[str, ...], int, int]]":
    """Yield the path of every key in ``mapping`` and in the mappings within, with its line and column."""
    for key, value in mapping.value:
        here = (*path, str(key.value))
        yield here, key.start_mark.line + 1, key.start_mark.column + 1
        if value.id == "mapping":
            yield from yaml_places(value, here)


@lru_cache(maxsize=1)
def _loader() -> Any:  # noqa: ANN401 - PyYAML has no types
    """Return the class that loads plain values, and takes for a number or a word what YAML 1.2 does."""
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    members = {"yaml_implicit_resolvers": {}, "construct_object": _placed(base.construct_object)}
    loader: Any = type("PlainLoader", (base,), members)
    for kind, pattern, first in _WORDS:
        whole = re.compile(rf"(?:{pattern})\Z")
        loader.add_implicit_resolver(f"{_TAG}{kind}", whole, ["", *first])
    return loader


def _placed(construct: "Callable[..., object]") -> "Callable[..., object]":
    """Return ``construct`` with the place of the value in each of its errors."""
    from yaml.constructor import ConstructorError

    def construct_object(self: object, node: "Node", deep: bool = False) -> object:
        try:
            return construct(self, node, deep=deep)
        except _UNFIT:
            kind = node.tag.removeprefix(_TAG)
            raise ConstructorError(None, None, f"the value is no {kind}", node.start_mark) from None

    return construct_object


def _check_events(events: "Iterable[Event]") -> None:
    """See that nothing grows when it is loaded, and that it is not nested too deeply."""
    import yaml

    depth, repeatable = 0, set[str]()
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise YamlFaultError(f"lists and objects are nested more than {MAX_DEPTH} deep", line)
            repeatable.discard(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and event.anchor:
            repeatable.add(event.anchor)
        elif isinstance(event, yaml.AliasEvent) and event.anchor not in repeatable:
            raise YamlFaultError(
                f"the alias *{event.anchor} repeats a list or an object",
                line,
                hint="write it out there; an alias may repeat a text",
            )


def _fault(error: "YAMLError") -> YamlFaultError:
    mark = getattr(error, "problem_mark", None)
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, None)
    return YamlFaultError(f"broken YAML: {getattr(error, 'problem', '') or error}", line, column)
