"""TOML files whose keys know their line. The standard library's parser gives values without places."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import Location, NotFoundError, StorageError, UsageError
from sftcli.input_files import read_whole

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PLACE = re.compile(r" \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")
_CLOSERS = ("]", "}", '"""', "'''")  # what can end a value that spans lines
MAX_CONFIG_BYTES = 4 << 20
_MAX_SHOWN = 100  # characters of an offending line


@dataclass(frozen=True, slots=True, kw_only=True)
class TomlDocument:
    """The content of a file, and where each of its keys stands.

    ``places`` has every dotted key and every table name; parts that are not bare keys are quoted in it.
    """

    name: str
    tables: Mapping[str, object]
    places: Mapping[str, Location]


def dotted(*parts: str) -> str:
    """Join the parts of a key; a part that TOML would quote is quoted, so that no two keys look alike."""
    return ".".join(part if _BARE_KEY.fullmatch(part) else f'"{part}"' for part in parts)


def tables_of(values: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Return values by settings key as a file has them: by section, then by name."""
    tables: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return tables


def read_toml(path: Path, *, name: str | None = None) -> TomlDocument:
    """Read a TOML file; ``name`` is what messages call it, by default the path as given.

    Raises:
        NotFoundError: There is no such file.
        UsageError: It is a folder, empty, not UTF-8, or not TOML.
        DataError: It is too large.
        StorageError: It cannot be read.
    """
    name = name or str(path)
    text = read_text(path, name)
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{name}: values are nested too deeply", location=Location(file=name)) from None
    except ValueError as error:
        raise _broken(name, text, str(error)) from None
    return TomlDocument(name=name, tables=tables, places=dict(_places(name, text)))


def read_text(path: Path, name: str) -> str:
    """Return the text of a file that a person wrote; ``name`` is what messages call it.

    Raises:
        NotFoundError, UsageError, DataError, StorageError: As ``read_toml``.
    """
    location = Location(file=name)
    try:
        # A byte order mark is what some Windows editors write; TOML itself has no use for one.
        text = read_whole(path, name=name, most_bytes=MAX_CONFIG_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(f"{name}: no such file", location=location) from None
    except IsADirectoryError:
        raise UsageError(f"{name} is a folder, expected a file", location=location) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: not UTF-8 text (byte {error.start})", hint="Save the file as UTF-8.", location=location
        ) from None
    except OSError as error:
        raise StorageError(f"{name}: cannot be read: {error.strerror or error}", location=location) from None
    if not text.strip():
        raise UsageError(f"{name}: the file is empty", hint="Write settings into it.", location=location)
    return text.replace("\r\n", "\n")


def _broken(name: str, text: str, message: str) -> UsageError:
    lines = text.split("\n")
    match = _PLACE.search(message)
    if match is None:  # not a fault of syntax, such as an integer of thousands of digits
        return UsageError(f"{name}: {message}", location=Location(file=name))
    line, column = int(match["line"] or len(lines)), int(match["column"] or len(lines[-1]) + 1)
    start = max(0, column - _MAX_SHOWN)
    source = "".join(char if char.isprintable() else " " for char in lines[line - 1])[
        start : start + _MAX_SHOWN
    ]
    what = message[: match.start()]
    return UsageError(
        f"{name}:{line}:{column}: {what[:1].lower()}{what[1:]}\n    {source}\n    {' ' * (column - 1 - start)}^",
        location=Location(file=name, line=line, column=column),
    )


def _places(name: str, text: str) -> Iterator[tuple[str, Location]]:
    """Yield each key of a valid document once, at the line where the statement that sets it begins.

    Statements are found by parsing: the shortest run of lines that is valid TOML by itself is one.
    """
    table: tuple[str, ...] = ()
    seen: set[str] = set()
    for line, statement in _statements(text):
        keys = list(_paths(tomllib.loads(statement)))
        if statement.lstrip().startswith("["):
            table = keys[-1]
            paths = [table]
        else:
            paths = [(*table, *key) for key in keys]
        for path in paths:
            if (key := dotted(*path)) not in seen:
                seen.add(key)
                yield key, _place(name, line, statement, path[-1])


def _statements(text: str) -> Iterator[tuple[int, str]]:
    first, pending = 1, ""
    for number, line in enumerate(text.split("\n"), start=1):
        opening = not pending
        first, pending = (number, line) if opening else (first, f"{pending}\n{line}")
        if not opening and not any(closer in line for closer in _CLOSERS):
            continue
        try:
            tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue
        yield first, pending
        pending = ""


def _paths(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key, tables before their content."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*path, key))


def _place(name: str, line: int, statement: str, key: str) -> Location:
    found = re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", statement)
    before = statement[: found.start()] if found else statement[: len(statement) - len(statement.lstrip())]
    return Location(
        file=name, line=line + before.count("\n"), column=len(before) - (before.rfind("\n") + 1) + 1
    )
