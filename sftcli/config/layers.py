"""One layer of settings per source, each value with the place it came from. Unknown keys become problems, not errors."""

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from sftcli.config.fields import value_from_text
from sftcli.config.foreign_config import ROWS
from sftcli.config.toml_file import TomlDocument, dotted, tables_of
from sftcli.errors import Location
from sftcli.suggest import aside, did_you_mean, nearest, question

ENVIRONMENT_PREFIX = "SFT_"
PRESET_ORIGIN = "preset "
NON_SETTING_VARIABLES = frozenset(
    {"SFT_CACHE_DIR", "SFT_DEBUG"}
)  # read elsewhere; they change no result of a run
_PRESET_ONLY = frozenset({"description", "extends"})

KEYS_HINT = "`sft train --print-config` lists every key, its value and where it was set."

Fields = Mapping[str, FieldInfo]  # every settings key with its field


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A value from the command line: of a flag, typed already, or of ``--set``, see ``parse_set``.

    ``origin`` is what the user typed, such as ``--max-steps``; ``None`` as the value unsets an optional key.
    """

    key: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A value of one key in one source; ``origin`` is how the source is shown to the user."""

    key: str
    value: object
    origin: str
    location: Location

    @property
    def where(self) -> str:
        """The place to go to in order to change the value."""
        if self.location.line is None:
            return self.origin
        return f"{self.location.file}:{self.location.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The values of one source. ``is_preset`` tells that its author is not the user."""

    entries: dict[str, Entry]
    is_preset: bool = False

    def tables(self) -> dict[str, dict[str, object]]:
        """Return the values as a file has them: by section, then by name."""
        return tables_of({key: entry.value for key, entry in self.entries.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with the settings, in one sentence that names its place."""

    text: str
    location: Location
    hint: str = ""


def sections_of(fields: Iterable[str]) -> frozenset[str]:
    """Return the sections of settings keys."""
    return frozenset(key.rpartition(".")[0] for key in fields)


def winning(layers: Sequence[Layer]) -> Mapping[str, Entry]:
    """Look up the winning entry of a key in ``layers`` as they are; later layers win."""
    return ChainMap(*(layer.entries for layer in reversed(layers)))


def document_layer(
    document: TomlDocument, fields: Fields, *, preset: str | None = None
) -> tuple[Layer, Sequence[Problem]]:
    """Read the sections of a file; ``preset`` is the preset's name where the file is one."""
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    sections = sections_of(fields)
    for key, value in _items(document.tables, lambda key: key in sections):
        if preset is not None and key in _PRESET_ONLY:
            continue
        location = document.places.get(key, Location(file=document.name))
        place = document.name if location.line is None else f"{location.file}:{location.line}"
        origin = place if preset is None else f"{PRESET_ORIGIN}{preset}"
        entry = Entry(key=key, value=value, origin=origin, location=location)
        if key in fields:
            entries[key] = entry
        else:
            problems.append(_unknown(entry, fields))
    return Layer(entries=entries, is_preset=preset is not None), problems


def _items(
    tables: Mapping[str, object], is_section: Callable[[str], bool], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, object]]:
    for name, value in tables.items():
        key = dotted(*path, name)
        if is_section(key) and isinstance(value, dict):
            yield from _items(value, is_section, (*path, name))
        else:
            yield key, value


def environment_layer(environ: Mapping[str, str], fields: Fields) -> tuple[Layer, Sequence[Problem]]:
    """Read the variables that start with ``SFT_``: ``SFT_TRAINING__MAX_STEPS`` is ``training.max_steps``."""
    keys = {environment_name(key): key for key in fields}
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in NON_SETTING_VARIABLES:
            continue
        location = Location(key=name)
        if name in keys:
            key = keys[name]
            value = value_from_text(fields[key], environ[name])
            entries[key] = Entry(key=key, value=value, origin=name, location=location)
        else:
            text = f"unknown environment variable {name}{_suggest_variable(name, fields)}"
            problems.append(Problem(text=text, location=location, hint=KEYS_HINT))
    return Layer(entries=entries), problems


def _suggest_variable(name: str, fields: Fields) -> str:
    known = (*map(environment_name, fields), *sorted(NON_SETTING_VARIABLES))
    if suggestion := aside(did_you_mean(name.upper(), known)):
        return suggestion
    keys = nearest(name.removeprefix(ENVIRONMENT_PREFIX).lower(), fields)  # finds one without its section
    return aside(question([environment_name(key) for key in keys]))


def environment_name(key: str) -> str:
    """Return the environment variable that sets ``key``."""
    return ENVIRONMENT_PREFIX + key.replace(".", "__").upper()


def override_layer(overrides: Sequence[Override], fields: Fields) -> tuple[Layer, Sequence[Problem]]:
    """Read flags and ``--set``; the later one of the same key wins."""
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for override in overrides:
        location = Location(key=override.key)
        entry = Entry(key=override.key, value=override.value, origin=override.origin, location=location)
        if override.key in fields:
            entries[override.key] = entry
        else:
            problems.append(_unknown(entry, fields))
    return Layer(entries=entries), problems


def _unknown(entry: Entry, fields: Fields) -> Problem:
    sections = sections_of(fields)
    key = entry.key
    if key in sections:
        example = next(name for name in fields if name.startswith(f"{key}."))
        text = f"{key!r} is a section and takes no value; set its keys, such as {example}"
    elif key in _PRESET_ONLY:
        text = f"{key!r} belongs in a preset; name the preset with --preset"
    else:
        near = sections if isinstance(entry.value, dict) else fields
        last = key.rpartition(".")[2]  # maybe another trainer's name in a section of ours
        is_ours = any(field.endswith(f".{last}") for field in fields)
        ours = "" if is_ours else next((f"here it is {ours}" for names, ours, _ in ROWS if last in names), "")
        text = f"unknown key {key!r}{aside(ours or did_you_mean(key, near))}"
    return Problem(text=f"{entry.where}: {text}", location=entry.location, hint=KEYS_HINT)
